//! The folders that `sprat share` added, so that they are shared again after a restart: `shares.json` in the state
//! directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::shares::ShareSpec;
use crate::safe_path;

#[derive(Serialize, Deserialize)]
struct Remembered {
    name: Option<String>,
    path: PathBuf,
}

/// What was remembered; nothing if there is no file.
///
/// # Errors
/// If the file is unreadable.
pub fn load(file: &Path) -> Result<Vec<ShareSpec>> {
    let bytes = match std::fs::read(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        bytes => bytes.with_context(|| format!("reading {}", file.display()))?,
    };
    let remembered: Vec<Remembered> =
        serde_json::from_slice(&bytes).with_context(|| format!("reading {}", file.display()))?;
    Ok(remembered
        .into_iter()
        .map(|one| ShareSpec {
            name: one.name,
            path: one.path,
        })
        .collect())
}

/// Remembers one more.
///
/// # Errors
/// As the file system answers.
pub fn add(file: &Path, spec: &ShareSpec) -> Result<()> {
    let mut all = load(file)?;
    if all.contains(spec) {
        return Ok(());
    }
    all.push(spec.clone());
    let all: Vec<_> = all
        .into_iter()
        .map(|one| Remembered {
            name: one.name,
            path: one.path,
        })
        .collect();
    safe_path::write_private(file, &serde_json::to_vec_pretty(&all)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_each_folder_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shares.json");
        assert!(load(&file).unwrap().is_empty());
        let spec = ShareSpec {
            name: Some("films".into()),
            path: "/srv/films".into(),
        };
        add(&file, &spec).unwrap();
        add(&file, &spec).unwrap();
        assert_eq!(load(&file).unwrap(), vec![spec]);
    }
}
