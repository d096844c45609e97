//! What the library knows, without locks, files or clocks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ffi::{OsStr, OsString},
    fs::File,
    ops::Bound,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Changes, Location, Published, Update};
use crate::{
    catalog::{FileInfo, FileKey},
    content::{ContentId, Manifest},
    have::HaveMap,
    safe_path::SafeName,
};

/// Changes that are remembered. A reader further behind gets the full listing.
pub(super) const MAX_LOG: usize = 65_536;

/// What the lock guards. `files` of every entry, `paths` and the locations in `names` always tell the same.
pub(super) struct LibraryState {
    /// The listing.
    pub(super) names: BTreeMap<SafeName, Listed>,
    /// The names of the complete file at a path: several if shares overlap. In the order of the bytes: paths compare by their
    /// components, which takes many times as long.
    paths: BTreeMap<OsString, Vec<SafeName>>,
    pub(super) contents: HashMap<ContentId, Entry>,
    pub(super) suspects: BTreeSet<PathBuf>,
    pub(super) n_files: u64,
    pub(super) n_bytes: u64,
    /// Downloads in progress that are on offer.
    pub(super) n_parts: usize,
    pub(super) version: u64,
    /// The latest changes; the last one made `version`.
    log: VecDeque<Change>,
    next_token: u64,
}

pub(super) struct Listed {
    id: ContentId,
    /// `None`: a download in progress.
    pub(super) location: Option<Arc<Location>>,
}

/// A content that is here, complete or in part; gone when neither is left.
pub(super) struct Entry {
    pub(super) manifest: Manifest,
    /// Its complete files, by name.
    pub(super) files: HashMap<SafeName, Arc<Location>>,
    pub(super) part: Option<PartialContent>,
}

pub(super) struct PartialContent {
    token: u64,
    file: Arc<File>,
    pub(super) have: HaveMap,
}

struct Change {
    key: FileKey,
    /// Whether the row was partial before; `None`: there was no such row.
    before: Option<bool>,
}

pub(super) enum ContentPlace {
    File(Arc<Location>),
    Part { file: Arc<File>, token: u64 },
}

impl LibraryState {
    pub(super) fn new() -> Self {
        Self {
            names: BTreeMap::new(),
            paths: BTreeMap::new(),
            contents: HashMap::new(),
            suspects: BTreeSet::new(),
            n_files: 0,
            n_bytes: 0,
            n_parts: 0,
            version: 1,
            log: VecDeque::new(),
            next_token: 0,
        }
    }

    /// See [`super::Library::publish`].
    pub(super) fn publish(&mut self, location: Arc<Location>, manifest: Manifest) -> Published {
        let id = manifest.id();
        if let Some(listed) = self.names.get_mut(&location.name) {
            match &mut listed.location {
                Some(held) if held.path() != location.path() => {
                    return Published::Clash(held.path());
                }
                Some(held) if listed.id == id => {
                    let entry = self
                        .contents
                        .get_mut(&id)
                        .expect("a listed content has an entry");
                    entry.files.insert(location.name.clone(), location.clone());
                    *held = location;
                    return Published::Same;
                }
                _ => self.unlist(&location.name),
            }
        }
        self.entry(manifest);
        self.list(location.name.clone(), id, Some(location));
        Published::New
    }

    /// Begins a download's offer; the token names it.
    pub(super) fn start_part(
        &mut self,
        manifest: Manifest,
        name: &SafeName,
        file: Arc<File>,
        have: HaveMap,
    ) -> u64 {
        let id = manifest.id();
        let token = self.next_token;
        self.next_token += 1;
        let entry = self.entry(manifest);
        if entry.part.is_none() {
            entry.part = Some(PartialContent { token, file, have });
            self.n_parts += 1;
            if !self.names.contains_key(name) {
                self.list(name.clone(), id, None);
            }
        }
        token
    }

    /// Ends a download's offer; does nothing if it is another one that is offered.
    pub(super) fn end_part(&mut self, id: &ContentId, token: u64, name: &SafeName) {
        if self.part(id, token).is_none() {
            return;
        }
        if let Some(entry) = self.contents.get_mut(id) {
            entry.part = None;
            self.n_parts -= 1;
        }
        if self
            .names
            .get(name)
            .is_some_and(|listed| listed.id == *id && listed.location.is_none())
        {
            self.unlist(name);
        }
        self.drop_unused(id);
    }

    /// The download in progress that this token names, if it is still on offer.
    pub(super) fn part(&mut self, id: &ContentId, token: u64) -> Option<&mut PartialContent> {
        self.contents
            .get_mut(id)?
            .part
            .as_mut()
            .filter(|part| part.token == token)
    }

    /// Where the complete file of this name lies.
    pub(super) fn location(&self, name: &SafeName) -> Option<&Arc<Location>> {
        self.names.get(name)?.location.as_ref()
    }

    /// The complete files at or beneath a path, with their names.
    pub(super) fn under(&self, path: &Path) -> impl Iterator<Item = (&Path, &Vec<SafeName>)> {
        let at = self.paths.get_key_value(path.as_os_str());
        // With a slash at its end, so that no other name begins with it.
        let folder = path.join("").into_os_string();
        let from = (Bound::Included(folder.as_os_str()), Bound::Unbounded);
        let beneath = self.paths.range::<OsStr, _>(from);
        let beneath =
            beneath.take_while(move |(found, _)| found.as_bytes().starts_with(folder.as_bytes()));
        at.into_iter()
            .chain(beneath)
            .map(|(path, names)| (Path::new(path), names))
    }

    /// Something to read the content from, except the files of the names in `tried`; a download comes last.
    pub(super) fn held(
        &self,
        id: &ContentId,
        tried: &[SafeName],
    ) -> Option<(Manifest, ContentPlace)> {
        let entry = self.contents.get(id)?;
        let held = match entry.files.iter().find(|(name, _)| !tried.contains(name)) {
            Some((_, location)) => ContentPlace::File(Arc::clone(location)),
            None => entry.part.as_ref().map(|part| ContentPlace::Part {
                file: Arc::clone(&part.file),
                token: part.token,
            })?,
        };
        Some((entry.manifest.clone(), held))
    }

    pub(super) fn files(&self) -> Vec<FileInfo> {
        self.names
            .iter()
            .filter_map(|(name, listed)| self.row(name, listed))
            .collect()
    }

    /// See [`super::Library::changes_since`].
    pub(super) fn changes_since(&self, version: u64) -> Changes {
        let oldest = self.version - self.log.len() as u64;
        let behind = version
            .checked_sub(oldest)
            .and_then(|at| usize::try_from(at).ok());
        let Some(at) = behind.filter(|at| *at <= self.log.len()) else {
            return Changes {
                version: self.version,
                update: Update::Full(self.files()),
            };
        };
        let mut touched = BTreeMap::new();
        for Change { key, before } in self.log.range(at..) {
            touched
                .entry((&key.name, key.content_id))
                .or_insert(*before);
        }
        let (mut added, mut removed) = (vec![], vec![]);
        for ((name, content_id), before) in touched {
            let listed = self
                .names
                .get(name)
                .filter(|listed| listed.id == content_id);
            match listed.and_then(|listed| self.row(name, listed)) {
                Some(row) if before != Some(row.partial) => added.push(row),
                None if before.is_some() => removed.push(FileKey {
                    name: name.clone(),
                    content_id,
                }),
                _ => {}
            }
        }
        Changes {
            version: self.version,
            update: Update::Delta { added, removed },
        }
    }

    fn row(&self, name: &SafeName, listed: &Listed) -> Option<FileInfo> {
        let size = self.contents.get(&listed.id)?.manifest.layout().size();
        Some(FileInfo {
            name: name.clone(),
            size,
            content_id: listed.id,
            partial: listed.location.is_none(),
        })
    }

    fn entry(&mut self, manifest: Manifest) -> &mut Entry {
        self.contents.entry(manifest.id()).or_insert_with(|| Entry {
            manifest,
            files: HashMap::new(),
            part: None,
        })
    }

    /// Puts a row into the listing. The name must be free and the content have its entry.
    fn list(&mut self, name: SafeName, id: ContentId, location: Option<Arc<Location>>) {
        self.note(&name, id, None);
        if let Some(location) = &location {
            let entry = self
                .contents
                .get_mut(&id)
                .expect("a content has an entry before it is listed");
            entry.files.insert(name.clone(), location.clone());
            self.n_files += 1;
            self.n_bytes += entry.manifest.layout().size();
            self.paths
                .entry(location.path().into_os_string())
                .or_default()
                .push(name.clone());
        }
        self.names.insert(name, Listed { id, location });
    }

    /// Takes a row out of the listing, and its file out of the library.
    pub(super) fn unlist(&mut self, name: &SafeName) {
        let Some(Listed { id, location }) = self.names.remove(name) else {
            return;
        };
        self.note(name, id, Some(location.is_none()));
        let Some(location) = location else { return };
        let entry = self
            .contents
            .get_mut(&id)
            .expect("a listed content has an entry");
        entry.files.remove(name);
        self.n_files -= 1;
        self.n_bytes -= entry.manifest.layout().size();
        let path = location.path().into_os_string();
        if let Some(names) = self.paths.get_mut(&path) {
            names.retain(|other| other != name);
            if names.is_empty() {
                self.paths.remove(&path);
            }
        }
        self.drop_unused(&id);
    }

    fn drop_unused(&mut self, id: &ContentId) {
        if self
            .contents
            .get(id)
            .is_some_and(|entry| entry.files.is_empty() && entry.part.is_none())
        {
            self.contents.remove(id);
        }
    }

    /// Logs a change of a row.
    fn note(&mut self, name: &SafeName, content_id: ContentId, before: Option<bool>) {
        self.version += 1;
        self.log.push_back(Change {
            key: FileKey {
                name: name.clone(),
                content_id,
            },
            before,
        });
        if self.log.len() > MAX_LOG {
            self.log.pop_front();
        }
    }
}
