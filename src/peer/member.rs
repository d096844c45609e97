//! Membership of this machine: its certificate, joining and renewing, the tracker's client, what is announced to it,
//! and how this machine stands with it.
//!
//! Invariant: what is told to the tracker, and believed of it, goes through this wing.

pub mod announce;
pub mod join;
pub mod membership;
pub mod standing;
pub mod tracker_client;
