//! Tests over real processes: every story starts its own tracker and peers from the shipped binary, in a folder of its
//! own, on ports of its own. `swarm.rs` is the harness, the other helpers play a slow network (`slow_link.rs`), a source
//! that lies (`liar.rs`) and callers from outside (`visitor.rs`).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::print_stderr,
    reason = "a failed test shows what its processes said"
)]
#![allow(unreachable_pub, reason = "a crate without users")]

mod process;
mod slow_link;
mod swarm;

mod liar;
mod visitor;

mod bad_input;
mod bad_messages;
mod bad_sources;
mod dashboard;
mod fan_out;
mod full_disk;
mod leaving;
mod limits;
mod long_line;
mod main_job;
mod many_files;
mod many_sources;
mod membership;
mod metrics;
mod moved;
mod namespaces;
mod operations;
mod operator;
mod outputs;
mod outside;
mod own_certificate;
mod partly;
mod poisoned;
mod reported;
mod request_id;
mod reuse;
mod shapes;
mod strangers;
mod tidy;
mod tracker_restart;
mod two_at_once;
mod unattended;
mod waiting;
mod watching;
