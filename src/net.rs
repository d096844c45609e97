//! The only module that opens a socket: it hands out every listener, accepts, dials, and says what addresses this
//! machine has.
//!
//! Invariants: a TCP connection carries TLS with a verified certificate (or ends at the enrollment router); every
//! handshake, preface, stream and connection has a limit and a deadline (`serve.rs`); Unix sockets serve the same user
//! only, the operator port this machine only (`http.rs`); data never shares a connection with control.

mod congestion;
mod dial;
mod first_byte;
mod http;
mod rpc;
mod sd_notify;
mod serve;
mod timed_tls;
mod write_timeout;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    path::Path,
};

use rustix::fs::{Mode, OFlags};
use tokio::net::{TcpListener, TcpSocket, UdpSocket, UnixListener, UnixStream};

pub use self::http::{bind_http, serve_http};
pub use congestion::{LONG, RoundTrip};
pub use dial::{Connection, DialError, DialRefusal, dial, dial_unix, pipe};
pub use hyper::body::Incoming;
pub use sd_notify::tell_manager;
pub use serve::{Front, Listener, ListenerLimits, serve_unix};

use crate::identity::Subject;

/// HTTP/2 settings of one kind of connection. Windows are what this end is willing to receive unread.
#[derive(Clone, Copy, Debug)]
pub struct Http2 {
    /// Bytes in flight per stream.
    pub stream_window: u32,
    /// Bytes in flight per connection.
    pub connection_window: u32,
    /// Longest frame this end accepts, bytes.
    pub frame: u32,
    /// Streams at once that this end serves.
    pub streams: u32,
    /// Bytes queued per stream for a slow receiver.
    pub send_buffer: usize,
}

/// For calls that carry words: tracker, enrollment, control.
pub const CONTROL: Http2 = Http2 {
    stream_window: 1 << 20,
    connection_window: 1 << 20,
    frame: 16 << 10,
    streams: 64,
    send_buffer: 256 << 10,
};

/// For calls that carry bytes: 8 MiB hold 1 Gbit/s over 60 ms.
pub const DATA: Http2 = Http2 {
    stream_window: 8 << 20,
    connection_window: 16 << 20,
    frame: 256 << 10,
    streams: 32,
    send_buffer: 1 << 20,
};

/// Descriptors for connections, shared files and `.part`s.
const DESCRIPTORS: u64 = 65_536;

/// Read buffer under TLS: the TLS library asks the socket for 4 KiB at a time.
const READ_BUFFER: usize = 128 << 10;

/// Who is at the other end of a connection; every request carries it as an extension.
#[derive(Clone, Debug)]
pub struct Caller {
    /// From the certificate; none on the enrollment router and on Unix sockets.
    pub subject: Option<Subject>,
    /// Where the connection comes from; none on Unix sockets.
    pub remote: Option<SocketAddr>,
    /// The connection's length, to be told by whoever learns it.
    pub line: RoundTrip,
}

impl Caller {
    /// Did the caller connect over loopback?
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.remote
            .is_some_and(|address| address.ip().to_canonical().is_loopback())
    }
}

/// Binds a TCP listener. `[::]` serves IPv4 too and falls back to `0.0.0.0` where IPv6 is off. If the port is taken
/// and `spread` is above 0, the next ports are tried.
///
/// # Errors
/// Names the address.
pub fn bind(address: SocketAddr, spread: u16) -> io::Result<TcpListener> {
    bind_near(address, spread, "--listen")
}

fn bind_near(address: SocketAddr, spread: u16, flag: &str) -> io::Result<TcpListener> {
    let mut last = None;
    for step in 0..=spread {
        let Some(port) = address.port().checked_add(step) else {
            break;
        };
        match bind_one(SocketAddr::new(address.ip(), port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && address.port() != 0 => {
                last = Some(error)
            }
            other => {
                return other.map_err(|e| {
                    io::Error::new(e.kind(), format!("cannot listen on {address}: {e}"))
                });
            }
        }
    }
    let error = last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into());
    Err(io::Error::new(
        error.kind(),
        format!("cannot listen on {address}: the port is in use; choose another with {flag}"),
    ))
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => match TcpSocket::new_v6() {
            Err(_) if address.ip().is_unspecified() => {
                return bind_one((Ipv4Addr::UNSPECIFIED, address.port()).into());
            }
            socket => socket?,
        },
    };
    if address.is_ipv6() && address.ip().is_unspecified() {
        rustix::net::sockopt::set_ipv6_v6only(&socket, false)?;
    }
    socket.set_reuseaddr(true)?;
    match socket.bind(address) {
        Err(error)
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && error.raw_os_error() == Some(99) =>
        {
            bind_one((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        Err(error) => Err(error),
        Ok(()) => socket.listen(1024),
    }
}

/// The addresses under which a listener on `bound` can be reached from elsewhere: itself if it is specific, else every
/// global or private address of this machine's interfaces; loopback ones last.
///
/// # Errors
/// If the interfaces cannot be listed.
pub fn reachable_at(bound: SocketAddr) -> io::Result<Vec<SocketAddr>> {
    if !bound.ip().is_unspecified() {
        return Ok(vec![bound]);
    }
    let mut addresses: Vec<IpAddr> = if_addrs::get_if_addrs()?
        .into_iter()
        .map(|interface| interface.ip())
        .collect();
    addresses.retain(|ip| offerable(*ip) && (bound.is_ipv6() || ip.is_ipv4()));
    addresses.sort_by_key(|ip| (ip.is_loopback(), ip.is_ipv6(), *ip));
    addresses.dedup();
    Ok(addresses
        .into_iter()
        .map(|ip| SocketAddr::new(ip, bound.port()))
        .collect())
}

/// May this address be offered to others at all? Unspecified, multicast, broadcast and link-local ones may not.
#[must_use]
pub fn offerable(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast() || ip.is_link_local())
        }
        IpAddr::V6(ip) => !(ip.is_unspecified() || ip.is_multicast() || ip.is_unicast_link_local()),
    }
}

/// The address of the interface that leads out of this machine, or loopback if none does. Nothing is sent.
pub async fn default_address() -> IpAddr {
    for (local, remote) in [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")] {
        if let Ok(socket) = UdpSocket::bind(local).await
            && socket.connect(remote).await.is_ok()
            && let Ok(address) = socket.local_addr()
            && offerable(address.ip())
        {
            return address.ip();
        }
    }
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

/// Best effort: with few descriptors a service has room for fewer at once.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(wanted);
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

/// How many descriptors this process may have open.
pub fn descriptor_limit() -> usize {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Binds `name` in `folder`, whatever the length of its path; a dead owner's socket is replaced, so the caller must
/// hold the folder's lock.
///
/// # Errors
/// As the system answers.
pub fn bind_unix(folder: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = rustix::fs::open(
        folder,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    match rustix::fs::unlinkat(&directory, name, rustix::fs::AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))?;
    rustix::fs::chmodat(
        &directory,
        name,
        Mode::from_raw_mode(0o600),
        rustix::fs::AtFlags::empty(),
    )?;
    Ok(listener)
}

async fn connect_unix(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let directory = rustix::fs::open(
        folder,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_named_or_passed_over() {
        let first = bind("127.0.0.1:0".parse().unwrap(), 0).unwrap();
        let taken = first.local_addr().unwrap();
        let error = bind(taken, 0).unwrap_err().to_string();
        assert!(
            error.contains(&taken.to_string()) && error.contains("in use"),
            "{error}"
        );
        if taken.port() < u16::MAX - 50 {
            assert!(bind(taken, 50).unwrap().local_addr().unwrap().port() > taken.port());
        }
    }

    #[tokio::test]
    async fn unspecified_listeners_are_reachable_at_interface_addresses() {
        let all = bind("[::]:0".parse().unwrap(), 0)
            .unwrap()
            .local_addr()
            .unwrap();
        let addresses = reachable_at(all).unwrap();
        assert!(
            addresses
                .iter()
                .all(|a| a.port() == all.port() && offerable(a.ip()))
        );
        let one: SocketAddr = "127.0.0.1:5".parse().unwrap();
        assert_eq!(reachable_at(one).unwrap(), vec![one]);
    }

    #[tokio::test]
    async fn unix_sockets_work_below_any_path_length() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(200)).join("e".repeat(200));
        std::fs::create_dir_all(&deep).unwrap();
        let _dead = bind_unix(&deep, "control.sock").unwrap();
        let listener = bind_unix(&deep, "control.sock").unwrap();
        let (client, server) = tokio::join!(connect_unix(&deep, "control.sock"), listener.accept());
        assert_eq!(
            client.unwrap().peer_cred().unwrap().uid(),
            server.unwrap().0.peer_cred().unwrap().uid()
        );
    }
}
