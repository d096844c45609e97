//! What each source did for a Get, for people.

/// How a source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Being dialled.
    Connecting,
    /// Connected.
    Active,
    /// To be tried again later.
    Resting,
    /// Sent wrong bytes.
    Banned,
    /// Given up.
    Gone,
}

/// What a source did for the whole Get, for people.
#[derive(Clone, Debug)]
pub struct SourceStats {
    /// Verified bytes that were new.
    pub bytes: u64,
    /// Bytes of no use: wrong, or brought by another source first.
    pub wasted: u64,
    /// How it stands.
    pub standing: Standing,
    /// The address in use.
    pub address: String,
    /// Chunk length in bytes and claim length in pieces.
    pub sizes: (u32, u32),
    /// Bytes a second, as its pace measures them.
    pub goodput: u64,
    /// Wrong answers so far.
    pub lies: u32,
    /// A good piece came from it, and nothing wrong since.
    pub is_proven: bool,
    /// Why it was last given up or rested.
    pub trouble: String,
}

impl Default for SourceStats {
    fn default() -> Self {
        Self {
            bytes: 0,
            wasted: 0,
            standing: Standing::Connecting,
            address: String::new(),
            sizes: (0, 0),
            goodput: 0,
            lies: 0,
            is_proven: false,
            trouble: String::new(),
        }
    }
}
