//! Fetching: what is wanted, who has it, which piece is asked of whom, and the way of its bytes to the disk.
//!
//! Invariant: bytes reach the disk only as verified pieces, and a file gets its name only when it is whole and durable.

mod claim_guard;
mod connections;
pub mod contents;
pub mod destination;
pub mod disk;
pub mod download;
pub mod engine;
pub mod find;
mod lane;
pub mod pace;
pub mod picker;
pub mod progress;
pub mod reuse;
pub mod session;
pub mod source;
pub mod source_stats;
pub mod sources;
mod stage_times;
pub mod storage;
pub mod swarm;
pub mod writer;
