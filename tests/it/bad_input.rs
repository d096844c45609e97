//! Whatever is wrong, one clear line says what and what next, the exit code tells it to programs, and nothing is left
//! half-done.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    thread,
};

use crate::{process::PATIENCE, swarm::Swarm, visitor::Badge};

#[test]
fn a_tracker_that_is_down_or_none() {
    let mut swarm = Swarm::start();
    swarm.join("a");
    let link = swarm.link(1);
    let address = swarm.address().to_owned();
    swarm.kill("tracker");
    for args in [
        &["ls"][..],
        &["get", "film", "-o", "x"],
        &["search", "film"],
    ] {
        swarm
            .run("a", args)
            .fails(10, &[&address, "is the tracker running"]);
    }
    swarm.run("b", ["join", &link]).fails(10, &[&address]);

    // Somebody else is there now, who speaks no TLS, or another one's.
    let listener = TcpListener::bind(&address).unwrap();
    let babbler = thread::spawn(move || {
        for stream in listener.incoming().take(3) {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    swarm.run("a", ["ls"]).fails(10, &[&address, "not a sprat"]);
    swarm
        .run("a", ["get", "film", "-o", "x"])
        .fails(10, &[&address]);
    swarm.run("b", ["join", &link]).fails(10, &[&address]);
    babbler.join().unwrap();
    assert!(!swarm.path("x").exists() && !swarm.path("b/identity/peer.crt").exists());
}

#[test]
fn tls_of_somebody_else_is_no_tracker() {
    let swarm = Swarm::start();
    swarm.join("a");
    let other = tls_server();
    let mut astray = swarm.command("a", ["ls"]);
    astray.env("SPRAT_PEER_TRACKER", &other);
    swarm
        .spawn_command(&mut astray, None)
        .finish(PATIENCE)
        .fails(11, &[&other, "certificate"]);
    let link = swarm.link(1).replace(swarm.address(), &other);
    swarm.run("b", ["join", &link]).fails(2, &["typo"]);
}

/// A server whose certificate signed itself; gives its address.
fn tls_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let badge = Badge::self_signed(|_| vec!["localhost".into()]);
    let config = badge.server();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut session = rustls::ServerConnection::new(config.clone()).unwrap();
            let _ = session.complete_io(&mut stream);
        }
    });
    address
}

#[test]
fn ports_and_folders_that_cannot_be_used() {
    let mut swarm = Swarm::start();
    let address = swarm.address().to_owned();
    swarm
        .run("second", ["tracker", "run", "--listen", &address])
        .fails(1, &[&address, "in use", "--listen"]);
    swarm.join("a");
    swarm
        .run("a", ["peer", "--listen", &address])
        .fails(1, &[&address, "in use"]);
    swarm
        .run("a", ["peer", "--listen", "127.0.0.1"])
        .fails(2, &["127.0.0.1", "HOST:PORT"]);
    swarm
        .run("a", ["peer", "--listen", "nowhere.invalid:1"])
        .fails(2, &["nowhere.invalid"]);

    let any = ["--listen", "127.0.0.1:0"];
    swarm
        .run("a", [&["peer", "--share", "missing"], &any[..]].concat())
        .fails(2, &["missing"]);
    fs::write(swarm.path("file"), "").unwrap();
    swarm
        .run("a", [&["peer", "--share", "file"], &any[..]].concat())
        .fails(2, &["file"]);
    swarm
        .run(
            "a",
            [&["peer", "--downloads", "/proc/downloads"], &any[..]].concat(),
        )
        .fails(8, &["/proc/downloads"]);
    swarm.run("file", ["tracker", "init"]).fails(1, &["file"]);
    swarm.start_peer("a", &[]);
    swarm.run("a", ["share", "missing"]).fails(2, &["missing"]);
}

#[test]
fn who_has_not_joined_is_told_how() {
    let swarm = Swarm::empty();
    for args in [
        &["ls"][..],
        &["get", "film"],
        &["peer", "--listen", "127.0.0.1:0"],
        &["search", "film"],
    ] {
        swarm.run("nobody", args).fails(11, &["sprat join"]);
    }
    swarm.run("nobody", ["status"]).fails(3, &["nothing runs"]);
    for args in [
        &["tracker", "token", "create"][..],
        &["tracker", "members"],
        &["operator", "cert", "--out", "o"],
    ] {
        swarm
            .run("none", args)
            .fails(3, &["no tracker", "sprat tracker init"]);
    }
    assert!(
        !swarm.path("none").exists(),
        "a question makes no state directory"
    );
}

#[test]
fn configuration_with_mistakes() {
    let swarm = Swarm::empty();
    let write = |name: &str, text: &str| {
        fs::write(swarm.path(name), text).unwrap();
        fs::set_permissions(swarm.path(name), fs::Permissions::from_mode(0o644)).unwrap();
    };
    write("mine.json", r#"{"tracker": {"lisen": "[::]:1"}}"#);
    let config = ["--config", "mine.json", "config", "show"];
    swarm.run("", config).fails(
        2,
        &[
            "mine.json",
            "tracker.lisen",
            "did you mean `tracker.listen`?",
        ],
    );
    write("mine.json", r#"{"peer": {"rescan_seconds": "often"}}"#);
    swarm.run("", config).fails(2, &["peer.rescan_seconds"]);
    write("mine.json", "{");
    swarm.run("", config).fails(2, &["mine.json"]);
    swarm
        .run("", ["--config", "missing.json", "config", "show"])
        .fails(2, &["missing.json"]);

    // Somebody else's, where we happen to run.
    write("config.json", r#"{"name": "another program", "port": 80}"#);
    let shown = swarm.run("", ["config", "show"]).ok();
    assert!(
        shown.stdout.contains("[::]:7700") && shown.stderr.is_empty(),
        "{shown:#?}"
    );
    let shown = swarm.run("", ["config", "show", "--verbose"]).ok();
    assert!(
        shown.stderr.contains("config.json is ignored"),
        "{shown:#?}"
    );
    write(
        "config.json",
        r#"{"tracker": {"listen": "127.0.0.1:1", "lease": 3}}"#,
    );
    swarm
        .run("", ["config", "show"])
        .fails(2, &["tracker.lease"]);
    write("config.json", r#"{"tracker": {"listen": "127.0.0.1:1"}}"#);
    let shown = swarm.run("", ["config", "show", "--origin"]).ok();
    assert!(
        shown.stdout.contains("127.0.0.1:1") && shown.stdout.contains("config.json"),
        "{shown:#?}"
    );
    fs::set_permissions(swarm.path("config.json"), fs::Permissions::from_mode(0o666)).unwrap();
    assert!(
        swarm
            .run("", ["config", "show"])
            .ok()
            .stdout
            .contains("[::]:7700")
    );

    let mut odd = swarm.command("", ["version"]);
    odd.env("SPRAT_TRACKER_LISEN", "x");
    let warned = swarm.spawn_command(&mut odd, None).finish(PATIENCE).ok();
    assert!(
        warned.stderr.contains("SPRAT_TRACKER_LISTEN"),
        "{warned:#?}"
    );
}

#[test]
fn wrong_words_and_no_terminal() {
    let swarm = Swarm::empty();
    swarm.run("", [] as [&str; 0]).fails(2, &["terminal"]);
    for args in [
        &["frobnicate"][..],
        &["get"],
        &["ls", "--no-such-flag"],
        &["ls", "--min-size", "huge"],
        &["ls", "--peer", "bob"],
        &["tracker", "token", "create", "--uses", "0"],
        &["tracker", "token", "create", "--ttl", "soon"],
        &["join"],
        &["join", "sprat://x"],
        &["join", "--token-file", "a", "sprat://x"],
        &["get", "a", "--rename", "--skip"],
    ] {
        let wrong = swarm.run("nobody", args);
        assert_eq!(
            (wrong.code, wrong.stdout.as_str()),
            (Some(2), ""),
            "{wrong:#?}"
        );
        assert!(!wrong.stderr.is_empty());
    }
    let help = swarm.run("", ["help"]).ok();
    assert!(help.stdout.contains("Exit codes") && help.stderr.is_empty());
    swarm.run("", ["version", "--json"]).ok().json();
}
