//! Who is not a member is refused at every call of every listener; who is one finds what belongs there, and acts for
//! nobody else.

use sprat::{
    identity::{OPERATOR_FILES, Role, Subject},
    proto::{
        FileEntry, HeartbeatRequest, RegisterBatch, RegisterHeader, RegisterRequest,
        register_request::Part, tracker_service_client::TrackerServiceClient,
    },
};
use tonic::Code;

use crate::{
    process::PATIENCE,
    swarm::Swarm,
    visitor::{Answer, Badge, call, connect, paths},
};

const JOIN: Option<&str> = Some("join.sprat.internal");
const NAMED: Option<&str> = Some("tracker.sprat.internal");

/// A tracker, and a member with a running peer that listens at the address given back.
fn network() -> (Swarm, String) {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 100_000, "film");
    swarm.sharing_peer("a", &[]);
    let status = swarm.wait_status("a", "tells its address", |_| true);
    let address = status["addresses"][0].as_str().unwrap().to_owned();
    (swarm, address)
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(work)
}

#[test]
fn strangers_are_refused_at_every_call() {
    let (swarm, peer) = network();
    let foreign = Swarm::start();
    foreign.join("m");
    swarm.join("revoked");
    let member = Badge::of_peer(&swarm.path("a"));
    let name = |role| {
        move |key: &sprat::identity::Key| {
            vec![
                Subject {
                    id: key.peer_id(),
                    role,
                }
                .name(),
            ]
        }
    };
    let tracker_key = Badge::self_signed(name(Role::Tracker));
    let strangers = [
        ("nobody", None),
        ("self-signed", Some(Badge::self_signed(name(Role::Peer)))),
        ("self-signed as tracker", Some(tracker_key)),
        (
            "of another network",
            Some(Badge::of_peer(&foreign.path("m"))),
        ),
        (
            "with a stolen certificate",
            Some(Badge::of_peer(&swarm.path("a")).with_key_of(&Badge::self_signed(|_| vec![]))),
        ),
    ];
    block_on(async {
        for path in paths() {
            for address in [swarm.address(), &peer] {
                for (who, badge) in &strangers {
                    for name in [None, NAMED] {
                        let answer =
                            call(connect(address, badge.as_ref(), name).await, &path).await;
                        assert_eq!(
                            answer,
                            Answer::Refused,
                            "{who} called {path} at {address} as {name:?}"
                        );
                    }
                }
            }
            // A peer enrolls nobody.
            let answer = call(connect(&peer, None, JOIN).await, &path).await;
            assert_eq!(
                answer,
                Answer::Refused,
                "nobody called {path} at the peer, to join"
            );
        }
        let answer = call(
            connect(&peer, Some(&member), None).await,
            "/grpc.health.v1.Health/Check",
        )
        .await;
        assert_eq!(
            answer,
            Answer::Status(Code::Ok),
            "the peer is alive, and lets members in"
        );
    });
}

/// Who, where, with which certificate, under which server name; and the services that are there.
type Door<'a> = (
    &'a str,
    &'a str,
    Option<&'a Badge>,
    Option<&'static str>,
    &'a [&'a str],
);

#[test]
fn every_door_leads_to_its_own_services_only() {
    let (swarm, peer) = network();
    let member = Badge::of_peer(&swarm.path("a"));
    swarm
        .run("tracker", ["operator", "cert", "--out", "operator"])
        .ok();
    let operator = Badge::load(&swarm.path("operator"), OPERATOR_FILES);
    let open = ["grpc.health.v1.Health", "grpc.reflection"];
    let doors: [Door<'_>; 6] = [
        (
            "a member at the tracker",
            swarm.address(),
            Some(&member),
            None,
            &["TrackerService", open[0], open[1]],
        ),
        (
            "an operator at the tracker",
            swarm.address(),
            Some(&operator),
            NAMED,
            &["TrackerService", open[0], open[1]],
        ),
        (
            "a member at a peer",
            &peer,
            Some(&member),
            None,
            &["ChunkService", open[0], open[1]],
        ),
        (
            "an operator at a peer",
            &peer,
            Some(&operator),
            None,
            &["ChunkService", open[0], open[1]],
        ),
        (
            "nobody at the join door",
            swarm.address(),
            None,
            JOIN,
            &["EnrollmentService"],
        ),
        (
            "a member at the join door",
            swarm.address(),
            Some(&member),
            JOIN,
            &["EnrollmentService"],
        ),
    ];
    block_on(async {
        for (who, address, badge, name, services) in doors {
            for path in paths() {
                let answer = call(connect(address, badge, name).await, &path).await;
                let Answer::Status(code) = answer else {
                    panic!("{who} was refused at {path}")
                };
                let is_there = services.iter().any(|service| path.contains(service));
                let expected = match (who, &*path) {
                    (_, "/sprat.v1.ChunkService/WatchHave") if is_there => continue,
                    (
                        "an operator at the tracker",
                        "/sprat.v1.TrackerService/Register" | "/sprat.v1.TrackerService/Heartbeat",
                    ) => code == Code::PermissionDenied,
                    _ if is_there => !matches!(
                        code,
                        Code::Unimplemented | Code::Unauthenticated | Code::Unavailable
                    ),
                    _ => code == Code::Unimplemented,
                };
                assert!(expected, "{who} called {path}: {code:?}");
            }
        }
    });
}

#[test]
fn a_member_acts_for_itself_only() {
    let (swarm, _) = network();
    let victim = swarm.join("victim");
    let member = Badge::of_peer(&swarm.path("a"));
    block_on(async {
        let connection = connect(swarm.address(), Some(&member), None).await.unwrap();
        let origin = connection.origin();
        let mut client = TrackerServiceClient::with_origin(connection, origin);
        let claim = HeartbeatRequest {
            peer_id: victim.clone(),
            leaving: true,
            ..HeartbeatRequest::default()
        };
        assert_eq!(
            client.heartbeat(claim).await.unwrap_err().code(),
            Code::PermissionDenied
        );
        let header = RegisterHeader {
            peer_id: victim.clone(),
            generation: u64::MAX,
            ..RegisterHeader::default()
        };
        let claim = RegisterRequest {
            part: Some(Part::Header(header)),
        };
        let refused = client
            .register(tokio_stream::iter([claim]))
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
    });
    swarm.wait_listed("victim", "film", 1);
}

#[test]
fn names_that_escape_are_refused() {
    let (swarm, _) = network();
    let member = Badge::of_peer(&swarm.path("a"));
    let long = [
        "x".repeat(256),
        "x/".repeat(513) + "x",
        "x/".repeat(32) + "x",
    ];
    let mut names: Vec<&str> = vec![
        "../x",
        "a/../../x",
        "a/b/../../../x",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "/etc/passwd",
        "//host/x",
        "C:\\x",
        "\\\\srv\\share",
        "a\0b",
        "a\nb",
        "\u{1b}[2J",
        "\u{7f}",
        "\u{9b}",
        "\u{202e}x",
        "\u{2066}x",
        "\u{200b}x",
        "\u{feff}x",
        "x.part",
        ".sprat",
    ];
    names.extend(long.iter().map(String::as_str));
    block_on(async {
        for name in names {
            let connection = connect(swarm.address(), Some(&member), None).await.unwrap();
            let origin = connection.origin();
            let mut client = TrackerServiceClient::with_origin(connection, origin);
            let header = RegisterHeader {
                generation: u64::MAX - 1,
                ..RegisterHeader::default()
            };
            let entry = FileEntry {
                name: name.into(),
                size: 1,
                content_id: "0".repeat(64),
                partial: false,
            };
            let batch = RegisterBatch {
                added: vec![entry],
                removed: vec![],
            };
            let parts = [Part::Header(header), Part::Batch(batch)]
                .map(|part| RegisterRequest { part: Some(part) });
            let refused = client
                .register(tokio_stream::iter(parts))
                .await
                .unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{name:?}: {refused}");
            assert!(
                !refused.message().contains(['\u{1b}', '\n', '\u{202e}']),
                "{refused:?}"
            );
        }
    });
    swarm.wait_listed("a", "film", 1);
    assert_eq!(swarm.ls("a").len(), 1);
}

#[test]
fn a_revoked_member_is_out_within_a_heartbeat() {
    let mut swarm = Swarm::with(&[
        ("SPRAT_TRACKER_HEARTBEAT_SECONDS", "1"),
        ("SPRAT_TRACKER_LEASE_SECONDS", "30"),
    ]);
    swarm.write("a-files/film", 2_000_000, "film");
    swarm.sharing_peer("a", &[]);
    swarm.write("bad-files/other", 1000, "other");
    let bad = swarm.sharing_peer("bad", &[]);
    swarm.wait_listed("bad", "film", 1);
    swarm.wait_listed("a", "other", 1);
    let status = swarm.wait_status("a", "tells its address", |_| true);
    let peer = status["addresses"][0].as_str().unwrap().to_owned();
    let badge = Badge::of_peer(&swarm.path("bad"));

    swarm.run("tracker", ["tracker", "revoke", &bad]).ok();
    swarm.run("bad", ["ls"]).fails(11, &[]);
    assert!(
        swarm.ls("a").iter().all(|row| row["name"] == "film"),
        "a revoked peer is listed no more"
    );
    let health = "/grpc.health.v1.Health/Check";
    crate::process::wait_until("the peer refuses it, too", PATIENCE, || {
        let answer =
            block_on(async { call(connect(&peer, Some(&badge), None).await, health).await });
        (answer == Answer::Refused).then_some(())
    });
    let members = swarm
        .run("tracker", ["tracker", "members", "--json"])
        .ok()
        .json();
    assert!(
        members
            .iter()
            .any(|member| member["peer_id"] == *bad && member["revoked"] == true)
    );
    swarm
        .run("tracker", ["tracker", "revoke", &bad])
        .fails(3, &["revoked already"]);

    swarm.run("tracker", ["tracker", "approve", &bad]).ok();
    swarm.run("bad", ["ls"]).ok();
    swarm.wait_listed("a", "other", 1);
}
