//! How the recorded shell scripts are read: text to commands.

use std::iter::Peekable;
use std::vec::IntoIter;

use super::shell::ShellError;

/// Most loops in one another: reading and running them takes stack.
pub(super) const MAX_DEPTH: usize = 16;

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

/// A command.
#[derive(Debug)]
pub(super) enum Command {
    /// Words, and a file for what it prints.
    Simple {
        condition: Condition,
        words: Vec<String>,
        file: Option<String>,
        piped: bool,
    },
    /// `for variable in values; do body; done`
    For {
        variable: String,
        values: Vec<String>,
        body: Vec<Command>,
    },
}

/// When a command is run, by how the one before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Whatever it was.
    Always,
    /// `&&`
    Success,
    /// `||`
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
            // Up to the end of the line, apostrophes and all.
            '#' if word.is_none() => {
                while chars.next_if(|char| *char != '\n').is_some() {}
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
fn commands(tokens: &mut Tokens, depth: usize) -> Result<Vec<Command>, ShellError> {
    if depth > MAX_DEPTH {
        return Err(ShellError::TooDeep);
    }
    let in_loop = depth > 0;
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
            Token::Word(word) if word == "for" => commands.push(for_loop(tokens, depth)?),
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

fn for_loop(tokens: &mut Tokens, depth: usize) -> Result<Command, ShellError> {
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
    let body = commands(tokens, depth + 1)?;
    Ok(Command::For {
        variable,
        values,
        body,
    })
}

/// Reads a script.
pub(super) fn parse(script: &str) -> Result<Vec<Command>, ShellError> {
    commands(&mut tokens(script)?.into_iter().peekable(), 0)
}
