//! Fetching: what is wanted, who has it, which piece is asked of whom, and the way of its bytes to the disk.
//!
//! Invariant: bytes reach the disk only as verified pieces, and a file gets its name only when it is whole and durable.

pub mod destination;
pub mod download;
pub mod find;
pub mod pace;
pub mod picker;
pub mod progress;
pub mod reuse;
pub mod source;
pub mod source_stats;
mod stage_times;
pub mod storage;
pub mod swarm;
