//! The little shell the recorded scripts need.
//!
//! `echo TEXT > FILE`, `echo TEXT`, `for v in A B; do …; done`, `$v`, `$?`, `;`, `&&` and `||`. Every other command
//! is taken for one that succeeds and does nothing: `insmod`, `ls`, `grep` and their like change no memory.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::vec::IntoIter;

use thiserror::Error;

/// Most commands a script may run: loops in loops grow fast.
const MAX_COMMANDS: u32 = 10_000;

/// A script this shell cannot run.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum ShellError {
    /// A quote or a loop has no end.
    #[error("{0} is not closed")]
    Unclosed(&'static str),
    /// A word is where it cannot be.
    #[error("unexpected {0:?}")]
    Unexpected(String),
    /// The loops run too long.
    #[error("more than {MAX_COMMANDS} commands are run")]
    TooLong,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// Quotes are gone, variables are still to be replaced.
    Word(String),
    /// `;` or a new line.
    End,
    /// `&&`
    And,
    /// `||`
    Or,
    /// `|`
    Pipe,
    /// `>` or `>>`, and whether standard output is meant.
    Redirect { stdout: bool },
}

#[derive(Debug)]
enum Command {
    Simple {
        condition: Condition,
        words: Vec<String>,
        file: Option<String>,
        piped: bool,
    },
    For {
        variable: String,
        values: Vec<String>,
        body: Vec<Command>,
    },
}

/// When a command is run, by how the one before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Always,
    Success,
    Failure,
}

fn tokens(script: &str) -> Result<Vec<Token>, ShellError> {
    let mut tokens = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = script.chars().peekable();
    while let Some(char) = chars.next() {
        let token = match char {
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some(end) if end == char => break,
                        Some(inner) => word.push(inner),
                        None => return Err(ShellError::Unclosed("a quote")),
                    }
                }
                continue;
            }
            ';' | '\n' => Some(Token::End),
            '&' if chars.next_if_eq(&'&').is_some() => Some(Token::And),
            '|' if chars.next_if_eq(&'|').is_some() => Some(Token::Or),
            '|' => Some(Token::Pipe),
            '>' => {
                let _append = chars.next_if_eq(&'>');
                let stdout = match word.as_deref() {
                    Some("2") => {
                        word = None;
                        false
                    }
                    Some("1") => {
                        word = None;
                        true
                    }
                    _ => true,
                };
                Some(Token::Redirect { stdout })
            }
            blank if blank.is_whitespace() => None,
            other => {
                word.get_or_insert_default().push(other);
                continue;
            }
        };
        tokens.extend(word.take().map(Token::Word));
        tokens.extend(token);
    }
    tokens.extend(word.map(Token::Word));
    Ok(tokens)
}

type Tokens = Peekable<IntoIter<Token>>;

/// Reads commands up to the end of the script, or up to `done` inside a loop.
fn commands(tokens: &mut Tokens, in_loop: bool) -> Result<Vec<Command>, ShellError> {
    let mut commands = Vec::new();
    let mut condition = Condition::Always;
    let mut piped = false;
    while let Some(token) = tokens.next() {
        match token {
            Token::End => (condition, piped) = (Condition::Always, false),
            Token::And => (condition, piped) = (Condition::Success, false),
            Token::Or => (condition, piped) = (Condition::Failure, false),
            Token::Pipe => piped = true,
            Token::Redirect { .. } => return Err(ShellError::Unexpected(">".into())),
            Token::Word(word) if in_loop && word == "done" => return Ok(commands),
            Token::Word(word) if word == "for" => commands.push(for_loop(tokens)?),
            Token::Word(word) => commands.push(simple(word, tokens, condition, piped)?),
        }
    }
    match in_loop {
        true => Err(ShellError::Unclosed("a loop")),
        false => Ok(commands),
    }
}

fn simple(
    first: String,
    tokens: &mut Tokens,
    condition: Condition,
    mut piped: bool,
) -> Result<Command, ShellError> {
    let mut words = vec![first];
    let mut file = None;
    loop {
        match tokens.next_if(|token| matches!(token, Token::Word(_) | Token::Redirect { .. })) {
            Some(Token::Word(word)) => words.push(word),
            Some(_redirect @ Token::Redirect { stdout }) => match tokens.next() {
                Some(Token::Word(target)) if stdout => file = Some(target),
                Some(Token::Word(_)) => {}
                // `2>&1`: the ampersand is a word of its own to us, with the number glued to it.
                other => return Err(ShellError::Unexpected(format!("{other:?} after >"))),
            },
            _ => break,
        }
    }
    piped |= matches!(tokens.peek(), Some(Token::Pipe));
    Ok(Command::Simple {
        condition,
        words,
        file,
        piped,
    })
}

fn for_loop(tokens: &mut Tokens) -> Result<Command, ShellError> {
    let word = |tokens: &mut Tokens| match tokens.next() {
        Some(Token::Word(word)) => Ok(word),
        Some(other) => Err(ShellError::Unexpected(format!("{other:?}"))),
        None => Err(ShellError::Unclosed("a loop")),
    };
    let variable = word(tokens)?;
    let keyword = word(tokens)?;
    if keyword != "in" {
        return Err(ShellError::Unexpected(keyword));
    }
    let mut values = Vec::new();
    while let Some(Token::Word(value)) = tokens.next_if(|token| matches!(token, Token::Word(_))) {
        values.push(value);
    }
    while tokens.next_if_eq(&Token::End).is_some() {}
    let keyword = word(tokens)?;
    if keyword != "do" {
        return Err(ShellError::Unexpected(keyword));
    }
    let body = commands(tokens, true)?;
    Ok(Command::For {
        variable,
        values,
        body,
    })
}

/// Runs scripts.
struct Shell<'a> {
    variables: BTreeMap<String, String>,
    failed: bool,
    left: u32,
    printed: Vec<String>,
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
                        for value in self.expand(value).split_whitespace() {
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
                    self.left = self.left.checked_sub(1).ok_or(ShellError::TooLong)?;
                    let due = match condition {
                        Condition::Always => true,
                        Condition::Success => !self.failed,
                        Condition::Failure => self.failed,
                    };
                    if due {
                        self.simple(words, file.as_deref(), *piped);
                    }
                }
            }
        }
        Ok(())
    }

    fn simple(&mut self, words: &[String], file: Option<&str>, piped: bool) {
        let words: Vec<_> = words.iter().map(|word| self.expand(word)).collect();
        let echo = words.first().is_some_and(|command| command == "echo");
        self.failed = match file {
            _ if !echo || piped => false,
            file => {
                let skip = 1 + usize::from(words.get(1).is_some_and(|option| option == "-n"));
                let text = words.get(skip..).unwrap_or_default().join(" ");
                match file {
                    Some(file) => {
                        let file = self.expand(file);
                        !(self.write)(&file, &text)
                    }
                    None => {
                        self.printed.push(text);
                        false
                    }
                }
            }
        };
    }

    /// Replaces `$v`, `${v}` and `$?`.
    fn expand(&self, word: &str) -> String {
        let mut expanded = String::new();
        let mut rest = word;
        while let Some((before, after)) = rest.split_once('$') {
            expanded.push_str(before);
            let name_length = |text: &str| {
                text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(text.len())
            };
            if let Some(after) = after.strip_prefix('?') {
                expanded.push(if self.failed { '1' } else { '0' });
                rest = after;
                continue;
            }
            let (name, after) = match after
                .strip_prefix('{')
                .and_then(|text| text.split_once('}'))
            {
                Some(braced) => braced,
                None => after.split_at(name_length(after)),
            };
            expanded.push_str(self.variables.get(name).map_or("", String::as_str));
            rest = after;
        }
        expanded + rest
    }
}

/// Runs a script and returns what `echo` printed. `write` is told of each file and text `echo` writes, and says
/// whether that worked.
///
/// # Errors
///
/// [`ShellError`] if the script is not one; nothing was run then, unless it runs too long.
pub(super) fn run(
    script: &str,
    write: &mut dyn FnMut(&str, &str) -> bool,
) -> Result<Vec<String>, ShellError> {
    let commands = commands(&mut tokens(script)?.into_iter().peekable(), false)?;
    let mut shell = Shell {
        variables: BTreeMap::new(),
        failed: false,
        left: MAX_COMMANDS,
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
        (writes, printed.unwrap())
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
        let refused = |script: &str| run(script, &mut |_, _| true).unwrap_err();
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
}
