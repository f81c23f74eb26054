//! A real browser without a window, asked through its DevTools protocol.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_harness::linux::{self, Cache, LinuxError, Progress};

/// Programs that do, where they are installed.
const INSTALLED: [&str; 4] = [
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
];

/// A browser with one page.
pub(crate) struct Browser {
    child: Child,
    requests: File,
    answers: BufReader<File>,
    session: String,
    last_id: u64,
    /// Everything that was told without being asked.
    pub(crate) events: Vec<Value>,
    _profile: TempDir,
}

/// The program of PATH, or the one of the cache, which is filled if need be.
fn program() -> Result<Command, LinuxError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .flat_map(|dir| INSTALLED.map(|name| dir.join(name)))
        .find(|program| program.is_file());
    if let Some(program) = found {
        return Ok(Command::new(program));
    }
    let cache = std::env::var_os("VMEM_LINUX_CACHE")
        .map(Into::into)
        .or_else(Cache::default_path);
    let cache = Cache::open(&cache.expect("VMEM_LINUX_CACHE or HOME names a folder"))?;
    Ok(linux::Browser::get(&cache, &mut Progress::stderr())?.command())
}

impl Browser {
    /// Opens `page` in a window of `width` by `height` pixels, and waits until it is loaded.
    ///
    /// # Errors
    ///
    /// If no browser can be had.
    pub(crate) fn open(page: &Path, width: u32, height: u32) -> Result<Self, LinuxError> {
        let mut command = program()?;
        let profile = TempDir::new().unwrap();
        let pipe = |name: &str| {
            let path = profile.path().join(name);
            let made = Command::new("mkfifo").arg(&path).status().unwrap();
            assert!(made.success());
            path
        };
        let (requests, answers) = (pipe("requests"), pipe("answers"));
        // A browser with --remote-debugging-pipe listens on descriptor 3 and answers on 4.
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(r#"in=$1 out=$2; shift 2; exec "$@" 3<"$in" 4>"$out""#)
            .arg("sh");
        shell
            .arg(&requests)
            .arg(&answers)
            .arg(command.get_program());
        shell.envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        shell
            .args(["--headless", "--remote-debugging-pipe", "--disable-gpu"])
            // The sandbox needs privileges a test may not have, and the page is our own.
            .args(["--no-sandbox", "--disable-dev-shm-usage", "--no-first-run"])
            .arg(format!("--window-size={width},{height}"))
            .arg(format!(
                "--user-data-dir={}",
                profile.path().join("profile").display()
            ))
            .arg("about:blank")
            .env("XDG_CACHE_HOME", profile.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(profile.path().join("log")).unwrap());
        command = shell;
        let child = command.spawn().unwrap();
        let requests = OpenOptions::new().write(true).open(requests).unwrap();
        let answers = BufReader::new(File::open(answers).unwrap());
        let mut browser = Self {
            child,
            requests,
            answers,
            session: String::new(),
            last_id: 0,
            events: Vec::new(),
            _profile: profile,
        };
        let target = browser.ask("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.ask("Target.attachToTarget", attach);
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.ask(&format!("{domain}.enable"), json!({}));
        }
        let url = format!("file://{}", fs::canonicalize(page).unwrap().display());
        let navigated = browser.ask("Page.navigate", json!({ "url": url }));
        assert!(navigated.get("errorText").is_none(), "{navigated}");
        while !browser
            .events
            .iter()
            .any(|event| event["method"] == "Page.loadEventFired")
        {
            let event = browser.read();
            browser.events.push(event);
        }
        Ok(browser)
    }

    /// Calls a method of the protocol.
    pub(crate) fn ask(&mut self, method: &str, params: Value) -> Value {
        self.last_id += 1;
        let id = self.last_id;
        let mut request = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_empty() {
            request["sessionId"] = json!(self.session);
        }
        let mut bytes = request.to_string().into_bytes();
        bytes.push(0);
        self.requests.write_all(&bytes).unwrap();
        loop {
            let mut message = self.read();
            if message["id"] == id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
            self.events.push(message);
        }
    }

    /// The value of an expression in the page.
    pub(crate) fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true });
        let mut answer = self.ask("Runtime.evaluate", params);
        assert!(answer.get("exceptionDetails").is_none(), "{answer}");
        answer["result"]["value"].take()
    }

    fn read(&mut self) -> Value {
        let mut message = Vec::new();
        self.answers.read_until(0, &mut message).unwrap();
        assert_eq!(message.pop(), Some(0), "the browser is gone");
        serde_json::from_slice(&message).unwrap()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It has nothing to say any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
