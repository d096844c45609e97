//! What the command line says of a source and of what holds a download up.

use super::output::count;
use crate::{proto::SourceProgress, safe_path::escape, units::human_size};

/// `abababab at 98.0 MiB/s in chunks of 256.0 KiB and claims of 64 pieces`
pub(super) fn describe(source: &SourceProgress) -> String {
    let (speed, chunk) = (
        human_size(source.bytes_per_second),
        human_size(source.chunk_length.into()),
    );
    let claim = count(source.claim_pieces.into(), "piece");
    format!(
        "{} at {speed}/s in chunks of {chunk} and claims of {claim}",
        short(&source.peer_id)
    )
}

/// The first characters of a peer id, enough to tell sources apart.
pub(super) fn short(peer: &str) -> String {
    escape(&peer.chars().take(8).collect::<String>())
}

/// What holds a download up, for people.
pub(super) fn in_words(bottleneck: &str) -> Option<&'static str> {
    Some(match bottleneck {
        "source_disk" => "the source's disk",
        "source_limit" => "an upload limit of the source",
        "network" => "the network, or the source's processor",
        "tls" => "decryption",
        "hashing" => "hashing",
        "disk" => "this disk",
        "limit" => "the download limit here",
        _ => return None,
    })
}
