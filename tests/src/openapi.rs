//! The document of the control API, and what can be made from it.

use jsonschema::Validator;
use serde_json::{Map, Value, json};
use vmm_harness::api::OPENAPI;

use crate::random::Random;

/// The document.
#[derive(Debug)]
pub struct Document(Value);

/// A method of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// As in the document, with `{id}`.
    pub path: String,
    /// In capitals.
    pub method: String,
}

impl Document {
    /// The one that belongs to this server.
    ///
    /// # Panics
    ///
    /// If it is no JSON.
    #[must_use]
    pub fn new() -> Self {
        Self(serde_json::from_str(OPENAPI).expect("the document is JSON"))
    }

    /// Every path.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let paths = self.0["paths"].as_object().into_iter().flatten();
        paths.map(|(path, _)| path.as_str())
    }

    /// Every method of every path.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        let paths = self.0["paths"].as_object().into_iter().flatten();
        let endpoint = |(path, methods): (&String, &Value)| {
            let names = methods.as_object().into_iter().flatten();
            let methods: Vec<_> = names
                .filter(|(name, _)| *name != "parameters")
                .map(|(name, _)| Endpoint {
                    path: path.clone(),
                    method: name.to_uppercase(),
                })
                .collect();
            methods
        };
        paths.flat_map(endpoint).collect()
    }

    fn endpoint(&self, endpoint: &Endpoint) -> &Value {
        &self.0["paths"][&endpoint.path][endpoint.method.to_lowercase()]
    }

    /// The status codes an endpoint may answer with.
    #[must_use]
    pub fn statuses(&self, endpoint: &Endpoint) -> Vec<u16> {
        let responses = self.endpoint(endpoint)["responses"].as_object();
        let codes = responses.into_iter().flatten();
        codes.filter_map(|(code, _)| code.parse().ok()).collect()
    }

    /// The content type and the schema of an answer; `None` if it has no body.
    #[must_use]
    pub fn response(&self, endpoint: &Endpoint, status: u16) -> Option<(&str, &Value)> {
        let response = &self.endpoint(endpoint)["responses"][status.to_string()];
        let (content_type, content) = response["content"].as_object()?.iter().next()?;
        Some((content_type, &content["schema"]))
    }

    /// The headers an answer must have, in lower case.
    #[must_use]
    pub fn headers(&self, endpoint: &Endpoint, status: u16) -> Vec<String> {
        let response = &self.endpoint(endpoint)["responses"][status.to_string()];
        let headers = response["headers"].as_object().into_iter().flatten();
        headers.map(|(name, _)| name.to_lowercase()).collect()
    }

    /// The schema of what an endpoint takes, if it takes anything.
    #[must_use]
    pub fn request(&self, endpoint: &Endpoint) -> Option<&Value> {
        let body = &self.endpoint(endpoint)["requestBody"];
        body["content"]["application/json"].get("schema")
    }

    /// A check of one schema.
    ///
    /// # Panics
    ///
    /// If it is no schema.
    #[must_use]
    pub fn validator(&self, schema: &Value) -> Validator {
        let mut schema = schema.clone();
        schema["components"] = self.0["components"].clone();
        jsonschema::validator_for(&schema).expect("the document has schemas")
    }

    /// A schema by its name.
    #[must_use]
    pub fn schema(&self, name: &str) -> Value {
        json!({ "$ref": format!("#/components/schemas/{name}") })
    }

    /// What `schema` is without references.
    #[must_use]
    pub fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(reference) => {
                let pointer = reference.trim_start_matches('#');
                self.resolve(self.0.pointer(pointer).unwrap_or(&Value::Null))
            }
            None => schema,
        }
    }

    /// Something `schema` allows.
    #[must_use]
    pub fn example(&self, schema: &Value, random: &mut Random) -> Value {
        let schema = self.resolve(schema);
        if let Some(constant) = schema.get("const") {
            return constant.clone();
        }
        for choices in ["enum", "oneOf"] {
            if let Some(choices) = schema[choices].as_array() {
                let choice = &choices[random.index(choices.len())];
                return match schema.get("enum") {
                    Some(_) => choice.clone(),
                    None => self.example(choice, random),
                };
            }
        }
        let kind = match &schema["type"] {
            Value::Array(kinds) => &kinds[random.index(kinds.len())],
            kind => kind,
        };
        match kind.as_str() {
            Some("object") => {
                let properties = schema["properties"].as_object().into_iter().flatten();
                let example = |(name, schema): (&String, &Value)| {
                    (name.clone(), self.example(schema, random))
                };
                Value::Object(properties.map(example).collect::<Map<_, _>>())
            }
            Some("array") => json!([self.example(&schema["items"], random)]),
            Some("integer") => json!(schema["minimum"].as_u64().unwrap_or(0)),
            Some("boolean") => json!(random.one_in(2)),
            // The only strings that are sent are sizes.
            Some("string") => json!("2M"),
            _ => Value::Null,
        }
    }
}

impl Default for Document {
    fn default() -> Self {
        Self::new()
    }
}
