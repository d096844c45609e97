//! A word to the service manager that started this process: systemd's `Type=notify` protocol, one datagram a word.
//!
//! Invariant: a manager that cannot be told is noted in the log and never ends a service.

use std::os::{
    linux::net::SocketAddrExt,
    unix::net::{SocketAddr, UnixDatagram},
};

/// Sends `state`, such as `READY=1`, to `NOTIFY_SOCKET`: a path, or `@` and a name without a file.
pub fn tell_manager(socket: &str, state: &str) {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(socket),
    };
    let told = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = told {
        tracing::warn!("telling {socket} {state}: {error}");
    }
}
