//! QEMU's machine protocol: JSON lines over a Unix socket, as far as a run needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::LinuxError;

/// QEMU answers at once, unless the machine it runs on is very busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection on which commands can be given.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to QEMU's socket.
    pub(super) fn connect(path: &Path) -> Result<Self, LinuxError> {
        let stream = UnixStream::connect(path).map_err(LinuxError::file(path))?;
        Self::negotiate(stream)
    }

    fn negotiate(stream: UnixStream) -> Result<Self, LinuxError> {
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            return Err(LinuxError::Qemu(format!("not a greeting: {greeting}")));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Gives a command; what it returns. Events that come first are dropped.
    pub(super) fn execute(
        &mut self,
        command: &str,
        arguments: &Value,
    ) -> Result<Value, LinuxError> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}").map_err(failed)?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                let reason = error["desc"].as_str().unwrap_or("no reason given");
                return Err(LinuxError::Qemu(format!("{command}: {reason}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn read(&mut self) -> Result<Value, LinuxError> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(LinuxError::Qemu("it has closed its control socket".into())),
            Ok(_) => serde_json::from_str(&line)
                .map_err(|error| LinuxError::Qemu(format!("{error}: {line}"))),
            Err(error) => Err(failed(error)),
        }
    }
}

fn failed(error: std::io::Error) -> LinuxError {
    LinuxError::Qemu(format!("control socket: {error}"))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A QEMU that answers each line with the next of `answers`, after its greeting.
    fn with_answers(answers: &'static [&'static str]) -> Result<Qmp, LinuxError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            let mut theirs = theirs;
            writeln!(theirs, "{{\"QMP\": {{\"version\": {{}}}}}}").unwrap();
            for answer in answers {
                let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
                assert!(line["execute"].is_string());
                writeln!(theirs, "{answer}").unwrap();
            }
        });
        Qmp::negotiate(ours)
    }

    #[test]
    fn events_are_no_answers() {
        let mut qmp = with_answers(&[
            "{\"return\": {}}",
            "{\"event\": \"RESUME\"}\n{\"return\": 7}",
        ])
        .unwrap();
        assert_eq!(qmp.execute("qom-get", &json!({})).unwrap(), json!(7));
    }

    #[test]
    fn an_error_names_the_command_and_the_reason() {
        let mut qmp =
            with_answers(&["{\"return\": {}}", "{\"error\": {\"desc\": \"too large\"}}"]).unwrap();
        let error = qmp.execute("qom-set", &json!({})).unwrap_err().to_string();
        assert_eq!(error, "QEMU: qom-set: too large");
        let error = qmp.execute("qom-set", &json!({})).unwrap_err().to_string();
        assert!(
            error.contains("closed") || error.contains("control socket"),
            "{error}"
        );
    }
}
