//! sprat: private swarms for big files.
//!
//! A **tracker** knows who is a member and who holds what. **Peers** keep the bytes and move them straight to one
//! another, many sources at once, over TLS 1.3 gRPC; each piece is verified before it is written or passed on, and
//! everybody who downloads also uploads.
//!
//! Modules in reading order; each imports only from those of lower levels (a test keeps it so):
//!
//! - [`units`][]: sizes, rates and durations as people write them
//! - [`exit`][]: exit codes
//! - [`backoff`][]: jittered delays
//! - [`content`][]: [`content::ContentId`], pieces, manifests and their proof: the only way to a [`content::VerifiedPiece`]
//! - [`safe_path`][]: names that may cross the wire, and every file that is created
//! - [`config`][]: settings and their layers
//! - [`have`][]: which pieces somebody holds
//! - [`identity`][]: keys, certificates, [`identity::PeerId`]
//! - [`token`][]: join links
//! - [`telemetry`][]: the log
//! - [`metrics`][]: what is counted
//! - [`request`][]: one id for a call and all that follow from it
//! - [`trust`][]: the authority and its signed list
//! - [`tls`][]: who is let in, and whom we believe to be whom
//! - [`net`][]: every socket
//! - [`catalog`][]: what is announced and listed
//! - [`proto`][]: the wire
//! - [`operator`][]: what the operator port answers
//! - [`tracker`][]: the tracker
//! - [`peer`][]: a peer: library, serving, downloading
//! - [`client`][]: calls to a running peer or tracker of this user
//! - [`cli`][]: commands
//! - [`menu`][]: the menu, which can do nothing that a command cannot
//! - [`demo`][]: a whole network on one machine
//!
//! What never happens: an unverified byte reaches a disk or another peer; a peer id comes from anywhere but a verified
//! certificate; the tracker sees file bytes; a session is plaintext or unauthenticated; a file is replaced.

pub mod backoff;
pub mod catalog;
pub mod cli;
pub mod client;
pub mod config;
pub mod content;
pub mod demo;
pub mod exit;
pub mod have;
pub mod identity;
pub mod menu;
pub mod metrics;
pub mod net;
pub mod operator;
pub mod peer;
pub mod proto;
pub mod request;
pub mod safe_path;
pub mod telemetry;
pub mod tls;
pub mod token;
pub mod tracker;
pub mod trust;
pub mod units;
