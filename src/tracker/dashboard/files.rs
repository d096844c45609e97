//! What is shared, and how often: the whole listing as of a moment ago, searched, sorted and given in pages.
//!
//! Invariant: a page costs no more than its rows once its question was asked; copies are counted by content, so that one
//! content under two names is not two copies.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::{Trouble, kept::Kept};
use crate::{
    catalog::{ContentPrefix, Query},
    content::ContentId,
    tracker::store::{Store, Surveyed},
};

/// Rows in a page when no number is named, and at most.
const PAGE: (usize, usize) = (25, 200);
/// Questions whose answers are kept: a few open pages, each with its own.
const VIEWS: usize = 8;

/// Which files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Only {
    #[default]
    All,
    /// One peer alone holds the whole.
    Last,
    /// Nobody holds the whole.
    Incomplete,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    #[default]
    Name,
    Size,
    Copies,
}

/// Which files in which order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct FilesQuery {
    /// Part of the name, or the beginning of the content id.
    text: String,
    only: Only,
    sort: Sort,
    descending: bool,
}

/// Which rows of them.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PageRange {
    offset: usize,
    limit: usize,
}

impl PageRange {
    /// The wanted part of `all`, or its last page if it ends before that, and where it begins.
    pub(super) fn of<T>(self, all: &[T]) -> (usize, &[T]) {
        let limit = if self.limit == 0 {
            PAGE.0
        } else {
            self.limit.min(PAGE.1)
        };
        let last_page = all.len().saturating_sub(1) / limit * limit;
        let offset = if self.offset < all.len() {
            self.offset
        } else {
            last_page
        };
        (offset, &all[offset..all.len().min(offset + limit)])
    }
}

#[derive(Debug, Serialize)]
pub(super) struct FilesPage {
    total: usize,
    matching: usize,
    offset: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    size: u64,
    content_id: String,
    complete: u32,
    partial: u32,
}

/// All files in a few numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct FilesSummary {
    /// Names.
    files: usize,
    contents: usize,
    /// Of all contents, each counted once.
    bytes: u64,
    /// Contents of which nobody, one peer, two, three or four, and more hold the whole.
    copies: [usize; 5],
}

/// The listing at a moment.
#[derive(Default)]
pub(super) struct Listing {
    rows: Vec<Surveyed>,
    /// A row of each content.
    by_content: HashMap<ContentId, u32>,
    pub(super) summary: FilesSummary,
}

impl Listing {
    fn new(rows: Vec<Surveyed>) -> Self {
        let mut by_content = HashMap::with_capacity(rows.len());
        let mut summary = FilesSummary {
            files: rows.len(),
            ..FilesSummary::default()
        };
        for (at, row) in (0..).zip(&rows) {
            if by_content.insert(row.key.content_id, at).is_none() {
                summary.contents += 1;
                summary.bytes = summary.bytes.saturating_add(row.size);
                summary.copies[match row.n_complete {
                    n @ 0..=2 => n as usize,
                    3 | 4 => 3,
                    _ => 4,
                }] += 1;
            }
        }
        Self {
            rows,
            by_content,
            summary,
        }
    }

    /// What a content is called.
    pub(super) fn name_of(&self, content: ContentId) -> Option<&str> {
        self.by_content
            .get(&content)
            .map(|at| self.rows[*at as usize].key.name.as_str())
    }

    /// The positions of the wanted rows.
    fn find(&self, wanted: &FilesQuery) -> Result<Vec<u32>, Trouble> {
        let text = wanted.text.trim();
        let matcher = Query {
            text: Some(text.to_owned()),
            ..Query::default()
        }
        .compile()
        .map_err(Trouble::asked)?;
        let prefix: Option<ContentPrefix> = text.parse().ok();
        let is_wanted = |row: &Surveyed| {
            let copies = match wanted.only {
                Only::All => true,
                Only::Last => row.n_complete == 1,
                Only::Incomplete => row.n_complete == 0,
            };
            copies
                && (matcher.matches_key(&row.key)
                    || prefix.is_some_and(|prefix| prefix.contains(row.key.content_id)))
        };
        let mut found: Vec<u32> = (0..)
            .zip(&self.rows)
            .filter(|(_, row)| is_wanted(row))
            .map(|(at, _)| at)
            .collect();
        let row = |at: &u32| &self.rows[*at as usize];
        match wanted.sort {
            Sort::Name => {}
            Sort::Size => found.sort_by_key(|at| row(at).size),
            Sort::Copies => found.sort_by_key(|at| (row(at).n_complete, row(at).n_partial)),
        }
        if wanted.descending {
            found.reverse();
        }
        Ok(found)
    }
}

/// The listing and what was lately asked of it.
pub(super) struct Files {
    store: Arc<dyn Store>,
    listing: Kept<Listing>,
    views: Mutex<VecDeque<View>>,
}

struct View {
    listing: Arc<Listing>,
    wanted: FilesQuery,
    found: Arc<Vec<u32>>,
}

impl Files {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            listing: Kept::new(),
            views: Mutex::default(),
        }
    }

    pub(super) async fn listing(&self) -> Result<Arc<Listing>, Trouble> {
        let survey = async {
            let rows = self.store.survey().await?;
            Ok(spawn_blocking(move || Listing::new(rows)).await?)
        };
        self.listing.get(survey).await
    }

    pub(super) async fn page(
        &self,
        wanted: FilesQuery,
        part: PageRange,
    ) -> Result<FilesPage, Trouble> {
        let listing = self.listing().await?;
        let found = match self.seen(&listing, &wanted) {
            Some(found) => found,
            None => {
                let (searched, asked) = (listing.clone(), wanted.clone());
                let found = Arc::new(spawn_blocking(move || searched.find(&asked)).await??);
                self.remember(View {
                    listing: listing.clone(),
                    wanted,
                    found: found.clone(),
                });
                found
            }
        };
        let (offset, rows) = part.of(&found);
        let rows = rows
            .iter()
            .map(|at| &listing.rows[*at as usize])
            .map(|row| Row {
                name: row.key.name.to_string(),
                size: row.size,
                content_id: row.key.content_id.to_string(),
                complete: row.n_complete,
                partial: row.n_partial,
            });
        Ok(FilesPage {
            total: listing.rows.len(),
            matching: found.len(),
            offset,
            rows: rows.collect(),
        })
    }

    fn views(&self) -> MutexGuard<'_, VecDeque<View>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self, listing: &Arc<Listing>, wanted: &FilesQuery) -> Option<Arc<Vec<u32>>> {
        let mut views = self.views();
        views.retain(|view| Arc::ptr_eq(&view.listing, listing));
        views
            .iter()
            .find(|view| view.wanted == *wanted)
            .map(|view| view.found.clone())
    }

    fn remember(&self, view: View) {
        let mut views = self.views();
        views.push_front(view);
        views.truncate(VIEWS);
    }

    pub(super) fn rest(&self) {
        if self.listing.rest() {
            self.views().clear();
        }
    }
}
