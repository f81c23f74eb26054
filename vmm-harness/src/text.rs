//! Text from elsewhere, on its way to a terminal.

/// Characters that are shown at the most.
const MAX_LEN: usize = 300;

/// `text`, from a server or a guest, fit to be shown: what would control a terminal, or change the direction or the
/// place of what is beside it, is replaced, and what is too long is cut.
#[must_use]
pub fn clean(text: &str) -> String {
    let fit = |c| match is_unfit(c) {
        true => char::REPLACEMENT_CHARACTER,
        false => c,
    };
    text.chars().take(MAX_LEN).map(fit).collect()
}

/// JSON that says the same, and has escapes in place of what is not fit to be shown. Line feeds are between its values.
#[must_use]
pub fn clean_json(json: &str) -> String {
    let mut clean = String::with_capacity(json.len());
    for c in json.chars() {
        match c != '\n' && is_unfit(c) {
            true => {
                let units = &mut [0; 2];
                let escapes = c
                    .encode_utf16(units)
                    .iter()
                    .map(|unit| format!("\\u{unit:04x}"));
                clean.extend(escapes);
            }
            false => clean.push(c),
        }
    }
    clean
}

/// Whether a character does something to a terminal, or to what is beside it.
pub(crate) fn is_unfit(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Without width; directions.
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            // Invisible copies of ASCII.
            | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_moves_a_cursor_or_turns_a_line_is_left() {
        let hostile = "a\x1b[2J\r\n\t\u{7f}\u{9b}31m\u{202e}b\u{200d}\u{feff}ä€";
        let clean = clean(hostile);
        assert_eq!(clean.chars().filter(|c| c.is_control()).count(), 0);
        assert_eq!(
            clean,
            "a\u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}31m\u{fffd}b\u{fffd}\u{fffd}ä€"
        );
        assert_eq!(super::clean(&"x".repeat(1 << 20)).len(), MAX_LEN);
    }

    #[test]
    fn json_says_the_same_without_what_moves_a_cursor() {
        let hostile =
            serde_json::json!({"a\u{202e}": ["\u{1b}]0;x\u{7}", "\u{9b}2J\u{e0041}", "\n", "ä€"]});
        let text = serde_json::to_string_pretty(&hostile).unwrap();
        let clean = clean_json(&text);
        assert!(!clean.contains(|c| c != '\n' && is_unfit(c)), "{clean}");
        assert!(clean.contains("ä€"), "{clean}");
        let back: serde_json::Value = serde_json::from_str(&clean).unwrap();
        assert_eq!(back, hostile);
    }
}
