//! The machine's own package sources: which mirrors it uses, and whose signatures it trusts there.
//!
//! Formats: sources.list(5), one entry a line (`.list`) or stanzas of fields (`.sources`).

use std::fmt::Write as _;
use std::path::Path;

/// A mirror with one suite of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) uri: String,
    pub(super) suite: String,
    components: Vec<String>,
    /// Everything that says how far the mirror is trusted, as fields of a stanza.
    options: Vec<(String, String)>,
}

/// Options that choose what to fetch; what is fetched here is not what the machine fetches.
const NOT_TAKEN_OVER: [&str; 9] = [
    "types",
    "uris",
    "suites",
    "components",
    "enabled",
    "architectures",
    "arch",
    "languages",
    "targets",
];

impl Source {
    /// Reads a file of apt's. What cannot be read is left out: apt, which is asked later, complains better.
    pub(super) fn read(path: &Path, text: &str) -> Vec<Self> {
        match path.extension() {
            Some(extension) if extension == "sources" => Self::read_stanzas(text),
            _ => text.lines().filter_map(Self::read_line).flatten().collect(),
        }
    }

    /// `deb [option=value …] uri suite component …`
    fn read_line(line: &str) -> Option<Vec<Self>> {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb")?;
        let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let options = options
            .split_whitespace()
            .filter_map(|option| option.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.replace(',', " ")));
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (uri, suite) = (words.next()?, words.next()?);
        Some(Self::each(
            &[uri],
            &[suite],
            &words.collect::<Vec<_>>(),
            options.collect(),
        ))
    }

    fn read_stanzas(text: &str) -> Vec<Self> {
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let stanzas = lines.split(|line| line.trim().is_empty());
        stanzas.filter_map(Self::read_stanza).flatten().collect()
    }

    fn read_stanza(lines: &[&str]) -> Option<Vec<Self>> {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in lines {
            if line.starts_with([' ', '\t']) {
                // A field goes on; embedded keys need their line breaks.
                let (_, value) = fields.last_mut()?;
                let _ = write!(value, "\n{line}");
            } else {
                let (key, value) = line.split_once(':')?;
                fields.push((key.trim().to_owned(), value.trim().to_owned()));
            }
        }
        let words = |key: &str| -> Vec<String> {
            let found = fields
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(key));
            found.map_or_else(Vec::new, |(_, value)| {
                value.split_whitespace().map(str::to_owned).collect()
            })
        };
        let enabled = words("enabled").first().is_none_or(|value| {
            !["no", "false", "without", "off", "disable"]
                .contains(&value.to_ascii_lowercase().as_str())
        });
        if !enabled || !words("types").iter().any(|kind| kind == "deb") {
            return None;
        }
        let (uris, suites, components) = (words("uris"), words("suites"), words("components"));
        Some(Self::each(&uris, &suites, &components, fields))
    }

    fn each(
        uris: &[String],
        suites: &[String],
        components: &[String],
        options: Vec<(String, String)>,
    ) -> Vec<Self> {
        let taken_over = |name: &str| !NOT_TAKEN_OVER.contains(&name.to_ascii_lowercase().as_str());
        let options: Vec<_> = options
            .into_iter()
            .filter(|(name, _)| taken_over(name))
            .collect();
        let pairs = uris
            .iter()
            .flat_map(|uri| suites.iter().map(move |suite| (uri, suite)));
        pairs
            .map(|(uri, suite)| Self {
                uri: uri.clone(),
                suite: suite.clone(),
                components: components.to_vec(),
                options: options.clone(),
            })
            .collect()
    }

    /// The mirror of a suite that this machine follows.
    ///
    /// Others also call their suites like Debian's. Debian's has a component `main`, and is most often followed
    /// with its updates.
    pub(super) fn of_suite<'a>(sources: &'a [Self], suite: &str) -> Option<&'a Self> {
        let main = |source: &&Self| {
            source
                .components
                .iter()
                .any(|component| component == "main")
        };
        let with_updates = |source: &&Self| {
            let updates = format!("{suite}-updates");
            sources
                .iter()
                .any(|other| other.uri == source.uri && other.suite == updates)
        };
        let mut candidates = sources
            .iter()
            .filter(|source| source.suite == suite)
            .filter(main);
        candidates
            .clone()
            .find(with_updates)
            .or_else(|| candidates.next())
    }

    /// As a stanza, for other suites of the same mirror.
    pub(super) fn stanza(&self, suites: &[&str]) -> String {
        let (uri, suites) = (&self.uri, suites.join(" "));
        let mut text = format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\n");
        for (name, value) in &self.options {
            let _ = writeln!(text, "{name}: {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "\
# A comment
Types: deb deb-src
URIs: http://mirror.example/debian
# in between
Suites: bookworm bookworm-updates
Components: main contrib
Architectures: amd64
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main
signed-by: /keys.gpg

Enabled: no
Types: deb
URIs: http://other.example/
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example/
Suites: bookworm
Components: main
";

    const LINES: &str = "\
# deb http://commented.example bookworm main
deb-src http://source.example bookworm main
deb http://third-party.example bookworm main
deb [arch=amd64,i386 signed-by=/a.gpg,/b.gpg] http://mirror.example/debian bookworm main # and so on
deb [signed-by=/a.gpg] http://mirror.example/debian bookworm-updates main
deb http://tools.example/linux/debian trixie stable
deb http://broken.example
";

    fn read(name: &str, text: &str) -> Vec<Source> {
        Source::read(Path::new(name), text)
    }

    #[test]
    fn stanzas_are_read_with_what_they_trust() {
        let sources = read("debian.sources", STANZAS);
        let uris: Vec<_> = sources
            .iter()
            .map(|source| (source.uri.as_str(), source.suite.as_str()))
            .collect();
        let (archive, security) = (
            "http://mirror.example/debian",
            "http://mirror.example/security",
        );
        assert_eq!(
            uris,
            [
                (archive, "bookworm"),
                (archive, "bookworm-updates"),
                (security, "bookworm-security")
            ]
        );
        let stanza = sources[0].stanza(&["trixie", "trixie-backports"]);
        assert_eq!(
            stanza,
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-backports\nComponents: main\n\
             Signed-By: \n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
        );
        // What is written is read as the same again.
        assert_eq!(read("x.sources", &stanza)[1].options, sources[0].options);
    }

    #[test]
    fn lines_are_read_with_what_they_trust() {
        let sources = read("sources.list", LINES);
        let uris: Vec<_> = sources.iter().map(|source| source.uri.as_str()).collect();
        let archive = "http://mirror.example/debian";
        assert_eq!(
            uris,
            [
                "http://third-party.example",
                archive,
                archive,
                "http://tools.example/linux/debian"
            ]
        );
        assert!(
            sources[1]
                .stanza(&["trixie"])
                .ends_with("Components: main\nsigned-by: /a.gpg /b.gpg\n")
        );
    }

    #[test]
    fn the_mirror_is_debians() {
        let sources = read("sources.list", LINES);
        let uri = |suite| Source::of_suite(&sources, suite).map(|source| source.uri.as_str());
        assert_eq!(uri("bookworm"), Some("http://mirror.example/debian"));
        assert_eq!(uri("trixie"), None, "it has no component main");
        // Without updates to tell them apart, the first one.
        let sources = &sources[..2];
        assert_eq!(
            Source::of_suite(sources, "bookworm").unwrap().uri,
            "http://third-party.example"
        );
    }
}
