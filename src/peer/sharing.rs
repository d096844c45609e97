//! What this machine offers: folders that are watched and hashed, the index of hashes, and the library of contents.
//!
//! Invariant: what the library lists was hashed from the file that has the listed stamp.

pub mod file_table;
pub mod hasher;
pub mod index;
pub mod library;
pub mod saved_shares;
pub mod scan;
pub mod share;
pub mod share_task;
pub mod shares;
pub mod watcher;
