//! One setting from one source: what both the reader of a file and the layers make settings of.
//!
//! Invariant: a [`Leaf`] that was settled has a known key, a value of that key's kind, and only absolute paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::{ConfigError, Share};

const PATH_KEYS: [&str; 6] = [
    "tracker.state_dir",
    "tracker.certificate",
    "tracker.certificate_key",
    "tracker.key_passphrase_file",
    "peer.state_dir",
    "peer.downloads",
];
const RATE_KEYS: [&str; 4] = [
    "peer.upload_limit",
    "peer.download_limit",
    "peer.upload_limit_per_peer",
    "peer.download_limit_per_peer",
];
/// Every setting (`tracker.listen`) with its default.
pub(super) type Known = BTreeMap<String, Json>;

/// One setting from one source.
#[derive(Debug, Clone)]
pub(super) struct Leaf {
    pub(super) key: String,
    pub(super) value: Json,
    pub(super) origin: String,
}

impl Leaf {
    pub(super) fn new(key: impl Into<String>, value: Json, origin: &str) -> Self {
        Self {
            key: key.into(),
            value,
            origin: origin.into(),
        }
    }

    /// Checks key and kind, and makes paths absolute: relative ones are meant from `base`.
    pub(super) fn settle(mut self, known: &Known, base: &Path) -> Result<Self, ConfigError> {
        let Some(default) = known.get(&self.key) else {
            let nearest = nearest(
                &self.key,
                &known.keys().map(String::as_str).collect::<Vec<_>>(),
            )
            .into();
            return Err(ConfigError::UnknownKey {
                place: self.origin,
                key: self.key,
                nearest,
            });
        };
        if default.is_null() && self.value == json!("") {
            self.value = Json::Null;
        }
        let outcome = check_kind(&self.key, default, &self.value).and_then(|()| {
            if let (Json::String(path), true) =
                (&mut self.value, PATH_KEYS.contains(&self.key.as_str()))
            {
                *path = absolute(base, Path::new(path))?;
            }
            if let (Json::Array(shares), "peer.shares") = (&mut self.value, self.key.as_str()) {
                for text in shares {
                    let mut share = Share::parse(text.as_str().unwrap_or_default())?;
                    share.dir = absolute(base, &share.dir)?.into();
                    *text = Json::String(share.into());
                }
            }
            Ok(())
        });
        match outcome {
            Ok(()) => Ok(self),
            Err(why) => Err(ConfigError::Value {
                place: self.origin,
                key: self.key,
                why,
            }),
        }
    }
}

fn check_kind(key: &str, default: &Json, value: &Json) -> Result<(), String> {
    let (fits, expected) = match default {
        _ if key == "tracker.memory_budget" => (
            value.is_u64() || value.is_string(),
            "a size such as \"2GiB\"",
        ),
        _ if RATE_KEYS.contains(&key) => (
            value.is_u64() || value.is_string() || value.is_null(),
            "a limit such as \"20MB\", or null",
        ),
        Json::Number(_) => (value.is_u64(), "a whole number"),
        Json::Bool(_) => (value.is_boolean(), "true or false"),
        Json::Array(_) => (
            value
                .as_array()
                .is_some_and(|items| items.iter().all(Json::is_string)),
            "a list of texts",
        ),
        Json::Null => (value.is_null() || value.is_string(), "a text or null"),
        _ => (value.is_string(), "a text"),
    };
    if fits {
        Ok(())
    } else {
        Err(format!("expected {expected}"))
    }
}

fn absolute(base: &Path, path: &Path) -> Result<String, String> {
    // Collecting the components drops every `.`.
    let path: PathBuf = base.join(path).components().collect();
    path.into_os_string()
        .into_string()
        .map_err(|path| format!("{} is not UTF-8", path.display()))
}

/// The candidate that `name` was most likely meant to be: the same key in another section, or the fewest edits away.
pub(super) fn nearest<'a>(name: &str, candidates: &[&'a str]) -> &'a str {
    let same_key = |candidate: &str| matches!((name.split_once('.'), candidate.split_once('.')), (Some(a), Some(b)) if a.1 == b.1);
    let distance = |candidate: &&&str| {
        if same_key(candidate) {
            1
        } else {
            edits(name, candidate)
        }
    };
    candidates
        .iter()
        .min_by_key(distance)
        .copied()
        .unwrap_or_default()
}

/// Levenshtein distance, over the first 64 characters.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn edits_are_a_distance(a in "[abc.]{0,8}", b in "[abc.]{0,8}", c in "[abc.]{0,8}") {
            prop_assert_eq!(edits(&a, &b), edits(&b, &a));
            prop_assert_eq!(edits(&a, &b) == 0, a == b);
            prop_assert!(edits(&a, &c) <= edits(&a, &b) + edits(&b, &c));
        }
    }
}
