//! The operator port: whom it answers, what, and how it says no.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::{
    process::{PATIENCE, wait_until},
    swarm::{Swarm, TRACKER},
};

/// An answer over HTTP/1.1.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: String,
}

/// Sends these bytes and reads until the other end closes.
fn send(address: &str, request: &str) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = String::new();
    // A server that refuses may close before it has read everything.
    let _ = stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.read_to_string(&mut said));
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or((&said, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or_default();
    Answer {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

/// What a page of a member's operator port says.
pub fn page(swarm: &Swarm, member: &str, path: &str) -> Answer {
    let address = swarm.operator(member);
    send(
        address,
        &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"),
    )
}

#[test]
fn pages_are_for_this_machine_and_for_reading() {
    let mut swarm = Swarm::start();
    swarm.sharing_peer("a", &[]);
    for member in [TRACKER, "a"] {
        let address = swarm.operator(member).to_owned();
        let port = address.rsplit_once(':').unwrap().1;
        let ask = |method: &str, path: &str, host: &str| {
            send(
                &address,
                &format!("{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n\r\n"),
            )
        };
        let own = format!("Host: localhost:{port}\r\n");
        let rebound = format!("Host: attacker.example:{port}\r\n");
        let answers = [
            (ask("GET", "/healthz", &own), 200),
            (ask("HEAD", "/healthz", &own), 200),
            (ask("GET", "/nothing", &own), 404),
            (ask("GET", "/../../../etc/passwd", &own), 404),
            (ask("GET", "/%2e%2e/%2e%2e/etc/passwd", &own), 404),
            (ask("GET", "/healthz", &rebound), 403),
            (ask("GET", "/healthz", "Host: localhost\r\n"), 403),
            (ask("GET", "/healthz", ""), 403),
            (ask("GET", "/healthz", &format!("{own}{rebound}")), 403),
            (
                ask(
                    "GET",
                    &format!("http://attacker.example:{port}/healthz"),
                    &own,
                ),
                403,
            ),
            (ask("POST", "/healthz", &own), 405),
            (ask("DELETE", "/healthz", &own), 405),
            (ask("OPTIONS", "/healthz", &own), 405),
        ];
        for (answer, status) in answers {
            assert_eq!(answer.status, status, "{answer:?}");
            for header in [
                "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                 img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                "x-content-type-options: nosniff",
                "x-frame-options: deny",
                "referrer-policy: no-referrer",
                "cross-origin-resource-policy: same-origin",
                "cross-origin-opener-policy: same-origin",
                "cache-control: no-store",
            ] {
                assert!(
                    answer.head.lines().any(|line| line == header),
                    "{header}: {answer:?}"
                );
            }
            assert!(!answer.head.contains("access-control"), "{answer:?}");
        }
        // Neither long heads nor what is no HTTP gets anywhere.
        let long = ask(
            "GET",
            "/healthz",
            &format!("{own}X: {}\r\n", "x".repeat(64 << 10)),
        );
        assert!(long.status != 200, "{long:?}");
        let many = ask(
            "GET",
            "/healthz",
            &format!("{own}{}", "X: x\r\n".repeat(100)),
        );
        assert!(many.status != 200, "{many:?}");
        assert_ne!(
            send(&address, "\x16\x03\x01 GET / HTTP/9\r\n\r\n").status,
            200
        );
        assert_eq!(page(&swarm, member, "/healthz").body, "alive\n");
    }
}

#[test]
fn a_crowd_is_turned_away_and_makes_room_when_it_leaves() {
    let swarm = Swarm::start();
    let address = swarm.operator(TRACKER).to_owned();
    let crowd: Vec<TcpStream> = (0..64)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    // The places are taken in order, so this one is the first that finds none.
    assert_eq!(page(&swarm, TRACKER, "/healthz").status, 0);
    drop(crowd);
    wait_until("there is room again", PATIENCE, || {
        (page(&swarm, TRACKER, "/healthz").status == 200).then_some(())
    });
}

#[test]
fn a_request_that_does_not_come_is_not_waited_for() {
    let swarm = Swarm::start();
    let address = swarm.operator(TRACKER).to_owned();
    // No `Connection: close`, and no empty line: the server alone can end this.
    let answer = send(
        &address,
        &format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\nX: "),
    );
    assert_ne!(answer.status, 200, "{answer:?}");
    let idle = send(
        &address,
        &format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n"),
    );
    assert_eq!(idle.status, 200, "{idle:?}");
}

#[test]
fn readiness_follows_the_tracker() {
    let mut swarm = Swarm::start();
    swarm.sharing_peer("a", &[]);
    assert_eq!(page(&swarm, TRACKER, "/readyz").body, "ready\n");
    assert_eq!(page(&swarm, "a", "/readyz").body, "ready\n");
    swarm.take("a").kill();
    let address = swarm.address().to_owned();
    swarm.kill(TRACKER);
    swarm.start_alone("a", &[]);
    let said = wait_until("the peer is not ready", PATIENCE, || {
        let answer = page(&swarm, "a", "/readyz");
        (answer.status == 503 && answer.body.contains(&address)).then_some(answer)
    });
    assert_eq!(
        (
            said.body.lines().count(),
            page(&swarm, "a", "/healthz").status
        ),
        (1, 200),
        "{said:?}"
    );
    swarm.start_tracker(&["--listen", &address]);
    wait_until("the peer is ready again", PATIENCE, || {
        (page(&swarm, "a", "/readyz").status == 200).then_some(())
    });
}

#[test]
fn an_operator_port_that_cannot_be_had_is_one_clear_line() {
    let mut swarm = Swarm::start();
    let taken = swarm.operator(TRACKER).to_owned();
    let run = |flag: &str| {
        swarm.run(
            "second",
            [
                "tracker",
                "run",
                "--listen",
                "127.0.0.1:0",
                "--operator",
                flag,
            ],
        )
    };
    run(&taken).fails(1, &[&taken, "in use", "--operator"]);
    run("0.0.0.0:7790").fails(2, &["0.0.0.0:7790", "loopback"]);
    run("[::]:0").fails(2, &["[::]:0", "loopback"]);
    run("7790").fails(2, &["7790", "HOST:PORT"]);
    swarm.join("a");
    swarm
        .run(
            "a",
            ["peer", "--listen", "127.0.0.1:0", "--operator", &taken],
        )
        .fails(1, &[&taken, "in use"]);
    swarm.start_peer("a", &["--operator", "none"]);
    assert!(
        swarm.running("a").stdout().contains("\"operator\":null"),
        "{}",
        swarm.running("a").said()
    );
}
