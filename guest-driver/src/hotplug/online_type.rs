//! What is asked for when a memory block is brought online.

use core::fmt;

use super::Error;

/// Which zone a memory block is to join. Whose word counts is told by [`Config`](super::Config).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OnlineType {
    /// The zone that fits best, by the zone rules or the online policy.
    Online,
    /// A kernel zone.
    Kernel,
    /// Zone Movable.
    Movable,
}

impl OnlineType {
    /// Every type.
    pub const ALL: [Self; 3] = [Self::Online, Self::Kernel, Self::Movable];

    /// The word for it in sysfs and on the kernel command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Kernel => "online_kernel",
            Self::Movable => "online_movable",
        }
    }

    /// The type `text` is the exact word for (`mhp_online_type_from_str`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for any other text, `offline` among them.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or(Error::Invalid)
    }

    /// The word for a default online type, as in `auto_online_blocks`: `None`, added blocks stay as they are,
    /// is `offline`.
    #[must_use]
    pub const fn default_name(default: Option<Self>) -> &'static str {
        match default {
            Some(online_type) => online_type.name(),
            None => "offline",
        }
    }

    /// The default online type `text` is the exact word for.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for any other text.
    pub fn parse_default(text: &str) -> Result<Option<Self>, Error> {
        if text == Self::default_name(None) {
            return Ok(None);
        }
        Self::parse(text).map(Some)
    }
}

impl fmt::Display for OnlineType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_exact() {
        for kind in OnlineType::ALL {
            assert_eq!(OnlineType::parse(kind.name()), Ok(kind));
        }
        for text in ["", "Online", "online ", "online_movable\n", "1", "offline"] {
            assert_eq!(OnlineType::parse(text), Err(Error::Invalid), "{text:?}");
        }
    }

    #[test]
    fn default_can_also_be_offline() {
        for default in [None, Some(OnlineType::Online), Some(OnlineType::Movable)] {
            let text = OnlineType::default_name(default);
            assert_eq!(OnlineType::parse_default(text), Ok(default));
        }
        assert_eq!(
            OnlineType::parse_default("going-offline"),
            Err(Error::Invalid)
        );
    }
}
