//! Tests over real processes: every story starts its own tracker and peers from the shipped binary, in a folder of its
//! own, on ports of its own. `swarm.rs` is the harness, the other helpers play a slow network (`slow_link.rs`), a source
//! that lies (`liar.rs`) and callers from outside (`visitor.rs`).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a failed test shows what its processes said")]
#![allow(unreachable_pub, reason = "a crate without users")]

mod process;
mod slow_link;
mod swarm;

mod liar;
mod visitor;

mod bad_input;
mod leaving;
mod main_job;
mod membership;
mod moved;
mod namespaces;
mod outputs;
mod own_certificate;
mod shapes;
mod strangers;
mod tidy;
mod tracker_restart;
mod two_at_once;
mod watching;
