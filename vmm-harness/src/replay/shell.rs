//! The little shell the recorded scripts need.
//!
//! `echo TEXT > FILE`, `cat FILE > FILE`, `echo TEXT`, `v=TEXT`, `for v in A B; do …; done`, `$v`, `$?`, `;`, `&&` and
//! `||`. Every other command is taken for one that succeeds and does nothing: `insmod`, `ls`, `grep` and their like
//! change no memory. A script that may change memory in another way is refused.

use std::collections::BTreeMap;

use thiserror::Error;

use super::script::{Command, Condition, MAX_DEPTH, parse};

/// Most commands a script may run: loops in loops grow fast.
const MAX_COMMANDS: u32 = 10_000;

/// Most bytes of all words a script may make: a loop whose variable holds another one twice doubles it.
const MAX_TEXT: usize = 1 << 20;

/// Where files change memory, or what becomes of it.
const MEMORY_FILES: [&str; 3] = [
    "/sys/devices/system/memory",
    "/sys/module/memory_hotplug",
    "notifier-error-inject",
];

/// Commands that write other than by redirection, run others, or decide what is run.
const UNSUPPORTED: [&str; 18] = [
    "if", "while", "until", "case", "{", "(", "[", "[[", "!", "test", "function", "tee", "dd",
    "cp", "sh", "eval", "xargs", "sysctl",
];

/// A script this shell cannot run.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum ShellError {
    /// A quote or a loop has no end.
    #[error("{0} is not closed")]
    Unclosed(&'static str),
    /// A word is where it cannot be.
    #[error("unexpected {0:?}")]
    Unexpected(String),
    /// Loops in loops in loops.
    #[error("more than {MAX_DEPTH} loops in one another")]
    TooDeep,
    /// The loops run too long.
    #[error("more than {MAX_COMMANDS} commands are run")]
    TooLong,
    /// The variables hold too much.
    #[error("more than {MAX_TEXT} bytes of text are made")]
    TooMuchText,
    /// It may change memory in a way this shell does not understand.
    #[error("the shell has no {0:?}, and the script may change memory with it")]
    Unsupported(String),
}

/// What `echo` printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Printed {
    /// The line.
    pub(super) text: String,
    /// It says how a write, numbered from 0, ended; the line if it had failed.
    pub(super) status_of: Option<(usize, String)>,
}

/// Runs scripts.
struct Shell<'a> {
    variables: BTreeMap<String, String>,
    failed: bool,
    /// The command before was this write.
    wrote: Option<usize>,
    writes: usize,
    commands_left: u32,
    text_left: usize,
    /// Nothing may be passed over.
    strict: bool,
    printed: Vec<Printed>,
    write: &'a mut dyn FnMut(&str, &str) -> bool,
}

impl Shell<'_> {
    fn run(&mut self, commands: &[Command]) -> Result<(), ShellError> {
        for command in commands {
            match command {
                Command::For {
                    variable,
                    values,
                    body,
                } => {
                    for value in values {
                        for value in self.expand(value)?.split_whitespace() {
                            // A loop costs, even one that is empty.
                            self.charge()?;
                            self.variables.insert(variable.clone(), value.to_owned());
                            self.run(body)?;
                        }
                    }
                }
                Command::Simple {
                    condition,
                    words,
                    file,
                    piped,
                } => {
                    self.charge()?;
                    let due = match condition {
                        Condition::Always => true,
                        Condition::Success => !self.failed,
                        Condition::Failure => self.failed,
                    };
                    self.refuse(words, file.as_deref(), *piped)?;
                    if due {
                        self.simple(words, file.as_deref(), *piped)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn charge(&mut self) -> Result<(), ShellError> {
        self.commands_left = self
            .commands_left
            .checked_sub(1)
            .ok_or(ShellError::TooLong)?;
        Ok(())
    }

    /// Refuses what would have to be understood, not passed over.
    fn refuse(&self, words: &[String], file: Option<&str>, piped: bool) -> Result<(), ShellError> {
        if !self.strict {
            return Ok(());
        }
        let command = words.first().map_or("", String::as_str);
        let redirected = (command != "echo" || piped) && file.is_some_and(may_be_memory);
        let unsupported =
            if redirected || UNSUPPORTED.contains(&command) || command.starts_with('(') {
                command
            } else if words.iter().any(|word| word == "&") {
                "&"
            } else if words.iter().any(|word| word.contains("$(")) {
                "$("
            } else if words.iter().any(|word| word.contains('`')) {
                "`"
            } else {
                return Ok(());
            };
        Err(ShellError::Unsupported(unsupported.to_owned()))
    }

    fn simple(
        &mut self,
        words: &[String],
        file: Option<&str>,
        piped: bool,
    ) -> Result<(), ShellError> {
        let expanded = words
            .iter()
            .map(|word| self.expand(word))
            .collect::<Result<Vec<_>, _>>()?;
        let wrote = self.wrote.take();
        if let [word] = &expanded[..]
            && let Some((name, value)) = word.split_once('=')
            && file.is_none()
            && !name.contains(|c: char| !is_name(c))
        {
            self.variables.insert(name.to_owned(), value.to_owned());
            self.failed = false;
            return Ok(());
        }
        // `cat FILE > FILE`, without what is in it.
        if let ([command, _], Some(file)) = (&expanded[..], file)
            && command == "cat"
            && !piped
        {
            let file = self.expand(file)?;
            self.write(&file, "");
            return Ok(());
        }
        if expanded.first().is_none_or(|command| command != "echo") || piped {
            self.failed = false;
            return Ok(());
        }
        let skip = 1 + usize::from(expanded.get(1).is_some_and(|option| option == "-n"));
        let text = expanded.get(skip..).unwrap_or_default().join(" ");
        let Some(file) = file else {
            let says = words.iter().any(|word| word.contains("$?"));
            let status_of = match wrote.filter(|_| says) {
                Some(write) => Some((write, self.line_after_failure(words, skip)?)),
                None => None,
            };
            self.printed.push(Printed { text, status_of });
            self.failed = false;
            return Ok(());
        };
        let file = self.expand(file)?;
        // Only full names are understood: neither where `cd` went, nor what a pattern matches.
        if self.strict && (!file.starts_with(['/', '&']) || file.contains(['*', '?', '['])) {
            return Err(ShellError::Unsupported(format!("> {file}")));
        }
        self.write(&file, &text);
        Ok(())
    }

    fn write(&mut self, file: &str, text: &str) {
        self.failed = !(self.write)(file, text);
        self.wrote = Some(self.writes);
        self.writes += 1;
    }

    /// What would be printed if the command before had failed.
    fn line_after_failure(&mut self, words: &[String], skip: usize) -> Result<String, ShellError> {
        let failed = std::mem::replace(&mut self.failed, true);
        let line: Result<Vec<_>, _> = words[skip.min(words.len())..]
            .iter()
            .map(|word| self.expand(word))
            .collect();
        self.failed = failed;
        Ok(line?.join(" "))
    }

    /// Replaces `$v`, `${v}` and `$?`.
    fn expand(&mut self, word: &str) -> Result<String, ShellError> {
        let mut expanded = String::new();
        let mut rest = word;
        while let Some((before, after)) = rest.split_once('$') {
            self.append(&mut expanded, before)?;
            if let Some(after) = after.strip_prefix('?') {
                let status = if self.failed { "1" } else { "0" };
                self.append(&mut expanded, status)?;
                rest = after;
                continue;
            }
            let length = after.find(|c| !is_name(c)).unwrap_or(after.len());
            let (name, after) = match after
                .strip_prefix('{')
                .and_then(|text| text.split_once('}'))
            {
                Some(braced) => braced,
                None => after.split_at(length),
            };
            if let Some(value) = self.variables.get(name) {
                self.text_left = left(self.text_left, value)?;
                expanded.push_str(value);
            }
            rest = after;
        }
        self.append(&mut expanded, rest)?;
        Ok(expanded)
    }

    fn append(&mut self, expanded: &mut String, text: &str) -> Result<(), ShellError> {
        self.text_left = left(self.text_left, text)?;
        expanded.push_str(text);
        Ok(())
    }
}

/// What is left of the text a script may make.
fn left(text_left: usize, text: &str) -> Result<usize, ShellError> {
    text_left
        .checked_sub(text.len())
        .ok_or(ShellError::TooMuchText)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Whether a name, before variables are replaced, may be one of a file that changes memory.
fn may_be_memory(file: &str) -> bool {
    let plain =
        file.starts_with('&') || file.starts_with('/') && !file.contains(['$', '*', '?', '[']);
    !plain || MEMORY_FILES.iter().any(|memory| file.contains(memory))
}

/// Whether a script may change memory: it names files that do, and writes some file.
fn may_change_memory(script: &str) -> bool {
    let redirects = || {
        let mut targets = script.split('>').skip(1).map(str::trim_start);
        // `>>` leaves nothing in between.
        targets.any(|target| {
            !target.is_empty() && !target.starts_with(['&']) && !target.starts_with("/dev/null")
        })
    };
    let writers = || {
        let mut words = script.split(|c: char| !is_name(c));
        words.any(|word| ["tee", "dd", "cp", "sysctl"].contains(&word))
    };
    MEMORY_FILES.iter().any(|file| script.contains(file)) && (redirects() || writers())
}

/// Runs a script and returns what `echo` printed. `write` is told of each file and text `echo` writes, and says
/// whether that worked.
///
/// # Errors
///
/// [`ShellError`] if the script is not one, or does what this shell does not understand.
pub(super) fn run(
    script: &str,
    write: &mut dyn FnMut(&str, &str) -> bool,
) -> Result<Vec<Printed>, ShellError> {
    let commands = parse(script)?;
    let mut shell = Shell {
        variables: BTreeMap::new(),
        failed: false,
        wrote: None,
        writes: 0,
        commands_left: MAX_COMMANDS,
        text_left: MAX_TEXT,
        strict: may_change_memory(script),
        printed: Vec::new(),
        write,
    };
    shell.run(&commands)?;
    Ok(shell.printed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a script writes, as `FILE=TEXT`, and what it prints. Files called `bad` cannot be written.
    fn outcome(script: &str) -> (Vec<String>, Vec<String>) {
        let mut writes = Vec::new();
        let printed = run(script, &mut |file, text| {
            writes.push(format!("{file}={text}"));
            file != "bad"
        });
        let lines = printed.unwrap().into_iter().map(|line| line.text);
        (writes, lines.collect())
    }

    #[test]
    fn echo_writes_and_other_commands_do_nothing() {
        let (writes, printed) =
            outcome("insmod /a.ko; echo -12 > /x/error; ls /x 2>/dev/null; grep -i a /proc/b | wc");
        assert_eq!(writes, ["/x/error=-12"]);
        assert!(printed.is_empty());
    }

    #[test]
    fn loops_replace_their_variable() {
        let (writes, printed) =
            outcome("for p in 0x1 0x2; do echo $p > /m/${p}_x; echo rc $?; done; echo end");
        assert_eq!(writes, ["/m/0x1_x=0x1", "/m/0x2_x=0x2"]);
        assert_eq!(printed, ["rc 0", "rc 0", "end"]);
    }

    #[test]
    fn loops_nest() {
        let (writes, _) = outcome("for a in 1 2; do for b in 3 4; do echo $a$b >f; done; done");
        assert_eq!(writes, ["f=13", "f=14", "f=23", "f=24"]);
    }

    #[test]
    fn result_of_a_write_is_known_to_the_next_command() {
        let (writes, printed) = outcome(
            "echo 1 > bad; echo rc $?; echo 1 > bad && echo 2 > good; echo 1 > bad || echo no",
        );
        assert_eq!(writes, ["bad=1", "bad=1", "bad=1"]);
        assert_eq!(printed, ["rc 1", "no"]);
    }

    #[test]
    fn quotes_keep_blanks_and_empty_texts() {
        let (writes, _) = outcome("echo \"a  b\" > f; echo -n '' > g; echo 'x;y' > h");
        assert_eq!(writes, ["f=a  b", "g=", "h=x;y"]);
    }

    #[test]
    fn what_goes_into_a_pipe_is_not_printed() {
        assert_eq!(
            outcome("echo a | cat; echo b"),
            (vec![], vec!["b".to_owned()])
        );
    }

    #[test]
    fn broken_and_endless_scripts_are_refused() {
        assert_eq!(refused("echo 'a"), ShellError::Unclosed("a quote"));
        assert_eq!(
            refused("for a in 1; do echo $a"),
            ShellError::Unclosed("a loop")
        );
        assert_eq!(refused("for"), ShellError::Unclosed("a loop"));
        assert!(matches!(refused("for a b"), ShellError::Unexpected(_)));
        assert!(matches!(refused("echo a >"), ShellError::Unexpected(_)));
        assert!(matches!(refused("> a"), ShellError::Unexpected(_)));
        let nested = "for a in 1 2 3 4 5 6 7 8 9; do ".repeat(6) + "echo" + &"; done".repeat(6);
        assert_eq!(refused(&nested), ShellError::TooLong);
    }

    fn refused(script: &str) -> ShellError {
        run(script, &mut |_, _| true).unwrap_err()
    }

    #[test]
    fn loops_are_neither_deep_nor_free() {
        let nested =
            |depth: usize| "for a in 1; do ".repeat(depth) + "echo" + &"; done".repeat(depth);
        assert_eq!(outcome(&nested(MAX_DEPTH)).1, [""]);
        assert_eq!(refused(&nested(MAX_DEPTH + 1)), ShellError::TooDeep);
        assert_eq!(
            refused(&"for a in 1; do ".repeat(1_000_000)),
            ShellError::TooDeep
        );
        let empty = "for a in 1 2 3 4 5 6 7 8 9; do ".repeat(16) + &"done;".repeat(16);
        assert_eq!(refused(&empty), ShellError::TooLong);
    }

    #[test]
    fn text_does_not_grow_without_limit() {
        let doubling = "for a in $a$a$a$a$a$a$a$a; do ".repeat(15);
        let script = format!(
            "for a in xxxxxxxx; do {doubling} echo {}",
            "; done".repeat(16)
        );
        assert_eq!(refused(&script), ShellError::TooMuchText);
        let values = "1 ".repeat(4_000);
        let script = format!("for a in {values}; do echo {}; done", "x".repeat(400));
        assert_eq!(refused(&script), ShellError::TooMuchText);
    }

    #[test]
    fn comments_are_skipped_and_variables_set() {
        let (writes, printed) = outcome("# don't\nd=/sys/m # can't\necho a#b > $d/x; echo rc $?");
        assert_eq!(writes, ["/sys/m/x=a#b"]);
        assert_eq!(printed, ["rc 0"]);
    }

    #[test]
    fn status_of_a_write_is_printed_by_the_next_command_only() {
        let printed = run(
            "echo 1 > /a; echo rc $?; echo rc $?; echo 2 > /b; ls; echo $?",
            &mut |_, _| true,
        );
        let printed: Vec<_> = printed
            .unwrap()
            .into_iter()
            .map(|line| line.status_of)
            .collect();
        assert_eq!(printed, [Some((0, "rc 1".to_owned())), None, None]);
    }

    #[test]
    fn what_may_change_memory_is_not_passed_over() {
        let state = "/sys/devices/system/memory/memory32/state";
        for (script, what) in [
            (format!("if true; then echo offline > {state}; fi"), "if"),
            (
                format!("while true; do echo offline > {state}; done"),
                "while",
            ),
            (
                format!("case a in a) echo offline > {state};; esac"),
                "case",
            ),
            (format!("printf offline > {state}"), "printf"),
            (format!("echo offline | tee {state}"), "tee"),
            (format!("echo $(cat /x) > {state}"), "$("),
            (format!("echo `cat /x` > {state}"), "`"),
            (format!("echo offline > {state} &"), "&"),
            (format!("false && (echo offline > {state})"), "("),
            (
                "cd /sys/devices/system/memory; echo offline > memory32/state".into(),
                "> memory32/state",
            ),
            (
                "echo 0 > /sys/devices/system/memory/memory*/online".into(),
                "> /sys/devices/system/memory/memory*/online",
            ),
        ] {
            match refused(&script) {
                ShellError::Unsupported(found) => {
                    assert!(found.starts_with(what), "{script}: {found}");
                }
                other => panic!("{script}: {other}"),
            }
        }
        for harmless in [
            "if true; then echo a > /tmp/a; fi",
            "for b in /sys/devices/system/memory/memory*; do echo $(cat $b/state 2>/dev/null); done",
            "printf a > /tmp/a",
            "echo 1 > /sys/devices/system/memory/memory32/online; dmesg > /tmp/log",
        ] {
            assert!(run(harmless, &mut |_, _| true).is_ok(), "{harmless}");
        }
    }
}
