//! Tokens, certificates and their ends.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::{
    main_job::slow_source,
    process::{PATIENCE, wait_until},
    swarm::{MIB, Swarm},
};

#[test]
fn tokens_are_good_for_what_they_say() {
    let swarm = Swarm::start();
    let link = swarm.link(2);
    assert!(
        link.starts_with(&format!("sprat://{}/a", swarm.address())),
        "{link}"
    );
    swarm.run("a", ["join", &link]).ok();
    // Joining again is no other machine, and a member stays who it is.
    let again = swarm.run("a", ["join", &link, "--json"]).ok().json();
    fs::write(swarm.path("link.txt"), format!("{link}\n")).unwrap();
    swarm.run("b", ["join", "--token-file", "link.txt"]).ok();
    swarm.run("c", ["join", &link]).fails(11, &["token"]);
    assert!(swarm.run("a", ["join", &link, "--json"]).ok().json() == again);

    fs::write(swarm.path("piped"), swarm.link(1)).unwrap();
    let piped = fs::File::open(swarm.path("piped")).unwrap();
    swarm
        .spawn_command(&mut swarm.command("d", ["join", "-"]), Some(piped.into()))
        .finish(PATIENCE)
        .ok();

    let brief = swarm
        .run("tracker", ["tracker", "token", "create", "--ttl", "1s"])
        .ok()
        .stdout;
    let made = Instant::now();
    wait_until("a second and a bit is over", PATIENCE, || {
        (made.elapsed() > Duration::from_millis(2_100)).then_some(())
    });
    swarm.run("e", ["join", brief.trim()]).fails(11, &["token"]);

    // No such token at this tracker, though everything else is right.
    let other = Swarm::start();
    other
        .run(
            "f",
            ["join", &link.replace(swarm.address(), other.address())],
        )
        .fails(2, &["typo"]);
    let mut typo = link.clone();
    typo.replace_range(40..41, if &link[40..41] == "x" { "y" } else { "x" });
    for bad in [
        &typo,
        &link[..link.len() - 9],
        "sprat://nowhere",
        "https://example.org/",
        "",
    ] {
        swarm.run("g", ["join", bad]).fails(2, &["link"]);
    }
    for member in ["c", "e", "f", "g"] {
        assert!(
            !swarm.path(member).join("identity/peer.crt").exists(),
            "{member}"
        );
        swarm.run(member, ["ls"]).fails(11, &["sprat join"]);
    }
}

#[test]
fn a_link_leads_to_its_own_network_only() {
    let (swarm, other) = (Swarm::start(), Swarm::start());
    swarm.join("a");
    // A member of one network with the link of another.
    swarm
        .run("a", ["join", &other.link(1)])
        .fails(9, &["another network"]);
    swarm.run("a", ["ls"]).ok();
    // Another tracker where this network's was: nothing is said to it.
    let flag = ["ls", "--json"];
    let mut astray = swarm.command("a", flag);
    astray.env("SPRAT_PEER_TRACKER", other.address());
    swarm
        .spawn_command(&mut astray, None)
        .finish(PATIENCE)
        .fails(11, &["another network"]);
}

#[test]
fn what_is_secret_is_readable_by_its_owner_only() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 1000, "film");
    swarm.sharing_peer("a", &[]);
    swarm
        .run("", ["join", &swarm.link(1), "--identity-only", "foreign"])
        .ok();
    swarm
        .run("tracker", ["operator", "cert", "--out", "operator"])
        .ok();
    assert_eq!(
        swarm.files_in("foreign"),
        ["ca.crt", "peer.crt", "peer.key"]
    );
    assert_eq!(
        swarm.files_in("operator"),
        ["ca.crt", "operator.crt", "operator.key"]
    );
    for folder in ["tracker", "a", "foreign", "operator"] {
        let mode = |name: &str| {
            fs::symlink_metadata(swarm.path(name))
                .unwrap()
                .permissions()
                .mode()
                & 0o777
        };
        assert_eq!(mode(folder), 0o700, "{folder}");
        for file in swarm.files_in(folder) {
            let name = format!("{folder}/{file}");
            assert_eq!(mode(&name) & 0o077, 0, "{name} is {:o}", mode(&name));
        }
    }
    swarm
        .run("tracker", ["operator", "cert", "--out", "operator"])
        .fails(9, &["exists"]);
    swarm
        .run("tracker", ["tracker", "init"])
        .fails(1, &["already runs"]);
    let fresh = swarm.run("second", ["tracker", "init"]).ok();
    assert!(!fresh.stdout.is_empty());
    swarm
        .run("second", ["tracker", "init"])
        .fails(9, &["never overwritten"]);
}

#[test]
fn a_link_read_from_a_pipe_may_come_late() {
    let swarm = Swarm::start();
    let mut join =
        swarm.spawn_command(&mut swarm.command("a", ["join", "-"]), Some(Stdio::piped()));
    let mut stdin = join.child().stdin.take().unwrap();
    stdin.write_all(swarm.link(1).as_bytes()).unwrap();
    drop(stdin);
    join.finish(PATIENCE).ok();
}

#[test]
fn state_directories_may_lie_deep_and_addresses_be_new() {
    let mut swarm = Swarm::empty();
    swarm.start_tracker(&["--listen", "[::1]:0"]);
    assert!(
        swarm.link(1).starts_with("sprat://[::1]:"),
        "{}",
        swarm.link(1)
    );
    let deep = format!("{}/{}", "d".repeat(150), "e".repeat(150));
    swarm.join(&deep);
    swarm.write("films/film", 10, "film");
    swarm.start_peer(&deep, &["--share", "films", "--listen", "[::1]:0"]);
    swarm.wait_listed(&deep, "film", 1);
    swarm.join("b");
    swarm.run("b", ["get", "film", "-o", "copy"]).ok();
    swarm.assert_same("films/film", "copy");
}

#[test]
fn one_minute_certificates_renew_themselves_while_a_peer_serves() {
    let mut swarm = Swarm::with(&[("SPRAT_TRACKER_LEAF_LIFETIME_SECONDS", "60")]);
    swarm.write("film", 40 * MIB, "film");
    let begun = Instant::now();
    let (_, _link) = slow_source(&mut swarm, "a", 600 << 10);
    swarm.join("b");
    swarm.wait_listed("b", "movies/film.mkv", 1);
    let certificate =
        |member: &str| fs::read(swarm.path(member).join("identity/peer.crt")).unwrap();
    let first = certificate("a");
    let status = swarm.wait_status("a", "has a minute", |_| true);
    assert!(
        (1..=60).contains(&status["certificate_seconds_left"].as_i64().unwrap()),
        "{status}"
    );

    // Lasts longer than any of the certificates it begins with.
    let get = swarm.spawn("b", ["get", "movies/film.mkv", "-o", "copy.mkv", "--json"]);
    wait_until(
        "the peer has another certificate",
        Duration::from_secs(55),
        || (certificate("a") != first).then_some(()),
    );
    wait_until("the first certificate has ended", PATIENCE, || {
        (begun.elapsed().as_secs() > 62).then_some(())
    });
    get.finish(PATIENCE).ok();
    swarm.assert_same("film", "copy.mkv");
    swarm.wait_listed("b", "movies/film.mkv", 1);
    let status = swarm.wait_status("a", "is online", |status| {
        status["tracker_state"] == "online"
    });
    assert!(
        status["certificate_seconds_left"].as_i64().unwrap() > 0,
        "{status}"
    );
}
