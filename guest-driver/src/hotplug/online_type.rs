//! temp
use super::Error;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnlineType {
    Online,
    Kernel,
    Movable,
}
impl OnlineType {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Kernel => "online_kernel",
            Self::Movable => "online_movable",
        }
    }
    pub fn name_or_offline(t: Option<Self>) -> &'static str {
        t.map_or("offline", Self::name)
    }
    pub fn parse_or_offline(text: &str) -> Result<Option<Self>, Error> {
        Ok(match text {
            "offline" => None,
            "online" => Some(Self::Online),
            "online_kernel" => Some(Self::Kernel),
            "online_movable" => Some(Self::Movable),
            _ => return Err(Error::Invalid),
        })
    }
}
