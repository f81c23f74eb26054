//! Text for the host, in the mailbox.

use core::fmt::{self, Display, Write};
use core::sync::atomic::Ordering;

use crate::abi::Mailbox;

/// Writes `text` into [`Mailbox::message`], cut where it does not fit.
///
/// A reader that looks meanwhile may see a part of it.
pub fn write_message(mailbox: &Mailbox, text: impl Display) {
    let mut message = Message { mailbox, len: 0 };
    // Fails when the text is cut, which is what we want then.
    let _cut = write!(message, "{text}");
    let len = u32::try_from(message.len).unwrap_or(0);
    mailbox.message_len.store(len, Ordering::Release);
}

struct Message<'a> {
    mailbox: &'a Mailbox,
    len: usize,
}

impl Write for Message<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let mut buffer = [0; 4];
            let bytes = character.encode_utf8(&mut buffer).as_bytes();
            let end = self.len + bytes.len();
            let cells = self.mailbox.message.get(self.len..end);
            for (cell, byte) in cells.ok_or(fmt::Error)?.iter().zip(bytes) {
                cell.store(*byte, Ordering::Relaxed);
            }
            self.len = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::tests::mailbox;

    fn read(mailbox: &Mailbox) -> String {
        let len = mailbox.message_len.load(Ordering::Acquire) as usize;
        let bytes = mailbox.message.iter().take(len);
        String::from_utf8(bytes.map(|b| b.load(Ordering::Relaxed)).collect()).unwrap()
    }

    #[test]
    fn message_that_does_not_fit_is_cut_between_characters() {
        let mailbox = mailbox();
        write_message(&mailbox, "no memory");
        assert_eq!(read(&mailbox), "no memory");
        write_message(&mailbox, format_args!("x{}", "é".repeat(400)));
        assert_eq!(read(&mailbox), format!("x{}", "é".repeat(255)));
    }
}
