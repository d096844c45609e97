//! The addresses that a service is told to listen on.
//!
//! Invariant: what is none is wrong usage.

use std::net::{SocketAddr, ToSocketAddrs};

use anyhow::Result;

use crate::{
    config,
    exit::{Exit, Failed},
};

/// The operator page's address, unless it is switched off.
pub(super) fn to_operate(text: &str) -> Result<Option<SocketAddr>> {
    if config::is_none(text) {
        Ok(None)
    } else {
        to_listen(text).map(Some)
    }
}

/// The address that `HOST:PORT` stands for on this machine.
pub(super) fn to_listen(text: &str) -> Result<SocketAddr> {
    let wrong = |why: String| Failed::new(Exit::Usage, format!("cannot listen on {text}: {why}"));
    let (host, port) =
        config::split_host_port(text).ok_or_else(|| wrong("not HOST:PORT".into()))?;
    let mut addresses = (host, port)
        .to_socket_addrs()
        .map_err(|error| wrong(error.to_string()))?;
    Ok(addresses
        .next()
        .ok_or_else(|| wrong("the name has no address".into()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_to_listen_on() {
        assert_eq!(
            to_listen("[::]:7700").unwrap(),
            "[::]:7700".parse().unwrap()
        );
        assert_eq!(
            to_listen("127.0.0.1:0").unwrap(),
            "127.0.0.1:0".parse().unwrap()
        );
        assert!(to_listen("localhost:1").unwrap().ip().is_loopback());
        let error = to_listen("7700").unwrap_err();
        let failed = error.downcast_ref::<Failed>().unwrap();
        assert_eq!(failed.exit, Exit::Usage);
    }
}
