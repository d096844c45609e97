//! A look at every row, for overviews: how many hold its content.

use std::ops::Bound;

use super::{SLICE, StoreIndex};
use crate::{catalog::FileKey, tracker::store::Surveyed};

impl StoreIndex {
    /// Surveys at most [`SLICE`] rows after `after` and moves it; false at the end.
    pub(in super::super) fn survey(
        &self,
        surveyed: &mut Vec<Surveyed>,
        after: &mut Option<FileKey>,
    ) -> bool {
        let from = after.take().map_or(Bound::Unbounded, Bound::Excluded);
        for (n, (key, _)) in self.rows.range((from, Bound::Unbounded)).enumerate() {
            if n == SLICE {
                return true;
            }
            surveyed.extend(self.surveyed(key));
            *after = Some(key.clone());
        }
        false
    }

    fn surveyed(&self, key: &FileKey) -> Option<Surveyed> {
        let content = self
            .contents
            .get(&key.content_id)
            .filter(|_| self.has_row(key))?;
        let (mut n_complete, mut n_partial) = (0, 0);
        for holder in content
            .holders
            .iter()
            .filter(|holder| self.is_live(holder.slot))
        {
            let count = if holder.n_complete > 0 {
                &mut n_complete
            } else {
                &mut n_partial
            };
            *count += 1;
        }
        Some(Surveyed {
            key: key.clone(),
            size: content.size,
            n_complete,
            n_partial,
        })
    }
}
