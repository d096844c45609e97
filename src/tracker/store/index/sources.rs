//! The sources of rows that are made together, in which the same ones come again and again.
//!
//! Invariant: a slot that is used again for another library is another source.

use std::{collections::HashMap, sync::Arc};

use super::Slot;
use crate::catalog::SourceInfo;

/// What was made so far.
pub(in super::super) struct RowSources {
    caller_is_loopback: bool,
    /// By the serial of the slot, and whether it holds a part.
    known: HashMap<(u64, bool), Arc<SourceInfo>>,
}

impl RowSources {
    pub(in super::super) fn new(caller_is_loopback: bool) -> Self {
        Self {
            caller_is_loopback,
            known: HashMap::new(),
        }
    }

    pub(super) fn of(&mut self, slot: &Slot, partial: bool) -> Arc<SourceInfo> {
        let made = self.known.entry((slot.serial, partial)).or_insert_with(|| {
            let addresses = slot.announcement.addresses_for(self.caller_is_loopback);
            Arc::new(SourceInfo {
                peer: slot.announcement.peer,
                addresses,
                partial,
            })
        });
        made.clone()
    }
}
