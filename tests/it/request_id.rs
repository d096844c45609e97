//! The log: one id from the first caller to the last, and a level that changes while it runs.

use serde_json::Value;

use crate::{
    metrics::curl_with,
    process::{PATIENCE, wait_until},
    swarm::{MIB, Swarm, TRACKER},
};

/// The lines of a member's log that stand under `method`, as objects.
fn lines(swarm: &mut Swarm, member: &str, method: &str) -> Vec<Value> {
    let said = swarm.running(member).stderr();
    let lines = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines
        .filter(|line| line["span"]["method"] == method)
        .collect()
}

fn wait_line(swarm: &mut Swarm, member: &str, method: &str, id: Option<&str>) -> Value {
    wait_until(&format!("{member} logs {method} {id:?}"), PATIENCE, || {
        let wanted = |line: &Value| id.is_none_or(|id| line["span"]["request_id"] == id);
        lines(swarm, member, method).into_iter().find(wanted)
    })
}

#[test]
fn one_id_goes_from_the_command_to_sources_and_tracker() {
    let mut swarm = Swarm::with(&[("SPRAT_LOG_LEVEL", "debug"), ("SPRAT_LOG_JSON", "1")]);
    swarm.write("a-files/film", 2 * MIB, "film");
    let source = swarm.sharing_peer("a", &[]);
    let sink = swarm.sharing_peer("sink", &["--downloads", "got"]);
    swarm.wait_listed("sink", "film", 1);
    swarm.run("sink", ["get", "film"]).ok();
    let get = wait_line(&mut swarm, "sink", "sprat.v1.ControlService/Get", None);
    let id = get["span"]["request_id"].as_str().unwrap().to_owned();
    assert_eq!(
        (id.len(), &get["fields"]["code"]),
        (16, &"ok".into()),
        "{get}"
    );
    let chunks = wait_line(
        &mut swarm,
        "a",
        "sprat.v1.ChunkService/GetChunks",
        Some(&id),
    );
    assert_eq!(chunks["span"]["caller"], *sink, "{chunks}");
    wait_line(
        &mut swarm,
        "a",
        "sprat.v1.ChunkService/GetManifest",
        Some(&id),
    );
    let watch = wait_line(
        &mut swarm,
        TRACKER,
        "sprat.v1.TrackerService/WatchFiles",
        Some(&id),
    );
    assert_eq!(watch["span"]["caller"], *sink, "{watch}");
    // What the source calls for itself has ids of its own.
    let others = lines(&mut swarm, TRACKER, "sprat.v1.TrackerService/Register");
    assert!(
        others.iter().any(|line| line["span"]["caller"] == *source),
        "{others:?}"
    );
    assert!(
        others.iter().all(|line| line["span"]["request_id"] != *id),
        "{others:?}"
    );
}

#[test]
fn an_id_from_outside_is_kept_if_it_is_one_and_replaced_if_not() {
    let mut swarm = Swarm::with(&[("SPRAT_LOG_LEVEL", "debug"), ("SPRAT_LOG_JSON", "1")]);
    swarm.join("a");
    for (sent, kept) in [
        ("job-17.b_c", true),
        ("a b\tc", false),
        ("\"},{\"x\":\"", false),
        (&*"x".repeat(65), false),
    ] {
        let before = lines(&mut swarm, TRACKER, "other").len();
        curl_with(
            &swarm,
            TRACKER,
            "a/identity/peer",
            "x.Y/Z",
            &["--header", &format!("x-request-id: {sent}")],
        )
        .ok();
        let logged = wait_until("the call is logged", PATIENCE, || {
            lines(&mut swarm, TRACKER, "other").into_iter().nth(before)
        });
        let id = logged["span"]["request_id"].as_str().unwrap();
        assert_eq!(
            (id == sent, id.len() == 16),
            (kept, !kept),
            "{sent:?}: {logged}"
        );
    }
}

#[test]
fn the_level_changes_while_it_runs() {
    let mut swarm = Swarm::with(&[("SPRAT_LOG_JSON", "1"), ("SPRAT_LOG_LEVEL", "warn")]);
    swarm.sharing_peer("a", &[]);
    for (member, flags) in [("a", &[][..]), (TRACKER, &["--tracker"])] {
        let ask = |level: &[&str]| {
            swarm.run(member, [&["log-level"], level, flags, &["--json"]].concat())
        };
        assert_eq!(ask(&[]).ok().json()[0]["level"], "warn");
        assert_eq!(ask(&["debug"]).ok().json()[0]["level"], "debug");
        ask(&["loud"]).fails(2, &["loud", "debug"]);
        assert_eq!(ask(&[]).ok().json()[0]["level"], "debug");
        assert_eq!(ask(&["error"]).ok().json()[0]["level"], "error");
    }
    for (member, method) in [
        ("a", "sprat.v1.ControlService/LogLevel"),
        (TRACKER, "sprat.v1.AdminService/LogLevel"),
    ] {
        // The first question came before the change, and the last change silenced its own line.
        let said = wait_line(&mut swarm, member, method, None);
        assert_eq!(said["level"], "INFO", "{said}");
    }
    swarm.kill("a");
    swarm.run("a", ["log-level"]).fails(3, &["no peer runs"]);
    swarm.kill(TRACKER);
    swarm
        .run(TRACKER, ["log-level", "debug", "--tracker"])
        .fails(1, &["no tracker runs"]);
}
