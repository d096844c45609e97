//! Metrics: what they say after something happened, that neither peers nor files make series, who may have them from
//! elsewhere, and that the manual lists them all.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use crate::{
    operator::page,
    process::{Outcome, PATIENCE, wait_until},
    swarm::{MIB, Swarm, TRACKER},
};

/// Series with their values.
pub type Series = BTreeMap<String, f64>;

fn series(text: &str) -> Series {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            line.rsplit_once(' ')
                .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
                .unwrap()
        })
        .collect()
}

pub fn metrics(swarm: &Swarm, member: &str) -> Series {
    let answer = page(swarm, member, "/metrics");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(
        answer
            .head
            .contains("content-type: text/plain; version=0.0.4"),
        "{}",
        answer.head
    );
    series(&answer.body)
}

/// Waits until this series of a member is as wanted: what has just happened may not be counted yet.
#[track_caller]
fn wait_for(swarm: &Swarm, member: &str, name: &str, wanted: impl Fn(f64) -> bool) {
    wait_until(&format!("{name} of {member}"), PATIENCE, || {
        metrics(swarm, member)
            .get(name)
            .is_some_and(|value| wanted(*value))
            .then_some(())
    });
}

#[test]
fn what_happened_is_counted() {
    const SIZE: u64 = 5 * MIB;
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", SIZE, "film");
    swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("sink", &["--downloads", "got"]);
    swarm.wait_listed("sink", "film", 1);
    swarm.run("sink", ["get", "film"]).ok();
    swarm
        .run("sink", ["get", "film", "-o", "/proc/nowhere/"])
        .fails(8, &["/proc/nowhere"]);

    let size = SIZE as f64;
    wait_for(
        &swarm,
        "sink",
        "sprat_transfers_total{result=\"done\"}",
        |n| n == 1.0,
    );
    wait_for(
        &swarm,
        "sink",
        "sprat_transfers_total{result=\"failed\"}",
        |n| n == 1.0,
    );
    wait_for(
        &swarm,
        "sink",
        "sprat_transfer_bytes_total{direction=\"received\"}",
        |n| n == size,
    );
    wait_for(
        &swarm,
        "sink",
        "sprat_pieces_total{outcome=\"verified\"}",
        |n| n == 80.0,
    );
    wait_for(&swarm, "sink", "sprat_pieces_total{outcome=\"bad\"}", |n| {
        n == 0.0
    });
    wait_for(
        &swarm,
        "sink",
        "sprat_chunk_length_bytes_count{direction=\"received\"}",
        |n| n >= 1.0,
    );
    wait_for(&swarm, "sink", "sprat_library_files", |n| n == 1.0);
    wait_for(&swarm, "sink", "sprat_transfers_active", |n| n == 0.0);
    wait_for(
        &swarm,
        "a",
        "sprat_transfer_bytes_total{direction=\"sent\"}",
        |n| n >= size,
    );
    let chunks = "method=\"sprat.v1.ChunkService/GetChunks\"";
    wait_for(
        &swarm,
        "a",
        &format!("sprat_rpc_requests_total{{{chunks},code=\"ok\"}}"),
        |n| n >= 1.0,
    );
    wait_for(
        &swarm,
        "a",
        &format!("sprat_rpc_duration_seconds_count{{{chunks}}}"),
        |n| n >= 1.0,
    );
    wait_for(
        &swarm,
        "a",
        &format!("sprat_rpc_in_flight{{{chunks}}}"),
        |n| n == 0.0,
    );
    wait_for(
        &swarm,
        "a",
        &format!("sprat_rpc_bytes_total{{{chunks},direction=\"sent\"}}"),
        |n| n >= size,
    );
    wait_for(&swarm, "a", "sprat_ready", |n| n == 1.0);
    wait_for(
        &swarm,
        "a",
        "sprat_certificate_seconds_left{certificate=\"leaf\"}",
        |n| n > 6.0 * 86_400.0,
    );
    wait_for(&swarm, TRACKER, "sprat_members{state=\"online\"}", |n| {
        n == 2.0
    });
    wait_for(&swarm, TRACKER, "sprat_leases", |n| n == 2.0);
    wait_for(&swarm, TRACKER, "sprat_listed_files", |n| n == 1.0);
    wait_for(&swarm, TRACKER, "sprat_connections", |n| n >= 2.0);
    let register =
        "sprat_rpc_requests_total{method=\"sprat.v1.TrackerService/Register\",code=\"ok\"}";
    wait_for(&swarm, TRACKER, register, |n| n >= 2.0);

    swarm.kill("a");
    wait_for(&swarm, TRACKER, "sprat_leases_expired_total", |n| n >= 1.0);
    wait_for(&swarm, TRACKER, "sprat_members{state=\"away\"}", |n| {
        n == 1.0
    });
}

#[test]
fn neither_peers_nor_files_make_series() {
    let mut swarm = Swarm::start();
    let mut ids = vec![];
    let mut grow = |swarm: &mut Swarm, members: &[&str], files: usize| {
        for member in members {
            for i in 0..files {
                swarm.write(
                    &format!("{member}-files/secret-{member}-{i}"),
                    10,
                    &format!("{member}{i}"),
                );
            }
            ids.push(swarm.sharing_peer(member, &[]));
        }
        let first = format!("secret-{}-0", members[0]);
        swarm.wait_listed(members[0], &first, 1);
        // RPCs make series, but only as many as there are methods and codes.
        let own = |name: &String| !name.starts_with("sprat_rpc_");
        let both = [TRACKER, "a"].map(|member| {
            metrics(swarm, member)
                .into_keys()
                .filter(own)
                .collect::<BTreeSet<_>>()
        });
        for member in [TRACKER, "a"] {
            let text = page(swarm, member, "/metrics").body;
            assert!(
                !text.contains("secret") && !ids.iter().any(|id| text.contains(id)),
                "{text}"
            );
        }
        both
    };
    let few = grow(&mut swarm, &["a"], 1);
    let many = grow(&mut swarm, &["b", "c"], 100);
    assert_eq!(few, many);
    // Whatever a member calls, it is one series.
    let visitor = ["secret.Service/Method", "x.Y/Z"];
    for path in visitor {
        curl(&swarm, TRACKER, "a/identity/peer", path);
    }
    let text = page(&swarm, TRACKER, "/metrics").body;
    assert!(
        text.contains("method=\"other\"") && !text.contains("secret"),
        "{text}"
    );
}

/// What curl says of `https://<service>.sprat.internal/PATH` at a member's port, with a certificate and its key.
fn curl(swarm: &Swarm, member: &str, pair: &str, path: &str) -> Outcome {
    curl_with(swarm, member, pair, path, &[])
}

/// The same, with more flags.
pub fn curl_with(swarm: &Swarm, member: &str, pair: &str, path: &str, flags: &[&str]) -> Outcome {
    let (name, address) = if member == TRACKER {
        ("tracker.sprat.internal", swarm.address().to_owned())
    } else {
        let status = swarm.wait_status(member, "has an address", |status| {
            status["addresses"][0].is_string()
        });
        (
            "peer.sprat.internal",
            status["addresses"][0].as_str().unwrap().to_owned(),
        )
    };
    let (host, port) = address.rsplit_once(':').unwrap();
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--http2",
        "--write-out",
        "%{http_code} %{http_version}",
    ]);
    command
        .args(flags)
        .args(["--resolve", &format!("{name}:{port}:{host}")]);
    let authority = Path::new(pair).with_file_name("ca.crt");
    command
        .arg("--cacert")
        .arg(swarm.path(authority.to_str().unwrap()));
    command
        .arg("--cert")
        .arg(swarm.path(&format!("{pair}.crt")))
        .arg("--key")
        .arg(swarm.path(&format!("{pair}.key")));
    command.arg(format!("https://{name}:{port}/{path}"));
    swarm.spawn_command(&mut command, None).finish(PATIENCE)
}

#[test]
fn from_elsewhere_they_are_for_operators() {
    let mut swarm = Swarm::start();
    swarm.sharing_peer("a", &[]);
    swarm.run(TRACKER, ["operator", "cert", "--out", "op"]).ok();
    for member in [TRACKER, "a"] {
        let answer = curl(&swarm, member, "op/operator", "metrics").ok().stdout;
        assert!(
            answer.contains("\nsprat_ready 1\n") && answer.ends_with("200 2"),
            "{answer}"
        );
        let refused = curl(&swarm, member, "a/identity/peer", "metrics")
            .ok()
            .stdout;
        assert!(
            !refused.contains("sprat_ready") && refused.ends_with("403 2"),
            "{refused}"
        );
    }
}

#[test]
fn the_manual_lists_them_all() {
    let mut swarm = Swarm::start();
    swarm.write("a-files/film", 10, "film");
    swarm.sharing_peer("a", &[]);
    swarm.wait_listed("a", "film", 1);
    let mut rows: BTreeMap<String, (String, BTreeSet<String>, BTreeSet<String>, String)> =
        BTreeMap::new();
    for (member, role) in [(TRACKER, "tracker"), ("a", "peer")] {
        let text = page(&swarm, member, "/metrics").body;
        for line in text.lines().filter_map(|line| line.strip_prefix("# HELP ")) {
            let (name, help) = line.split_once(' ').unwrap();
            let kind = text
                .lines()
                .find_map(|line| line.strip_prefix(&format!("# TYPE {name} ")))
                .unwrap();
            let row = rows
                .entry(name.into())
                .or_insert_with(|| (kind.into(), [].into(), [].into(), help.into()));
            row.1.insert(role.into());
            let samples = text.lines().filter(|line| {
                let sample = line.split(['{', ' ']).next().unwrap();
                [name.to_owned(), format!("{name}_bucket")].contains(&sample.to_owned())
            });
            for labels in
                samples.filter_map(|line| Some(line.split_once('{')?.1.split_once('}')?.0))
            {
                row.2.extend(
                    labels
                        .split("\",")
                        .map(|label| label.split('=').next().unwrap().to_owned()),
                );
            }
            row.2.remove("le");
        }
    }
    let join = |words: BTreeSet<String>| words.into_iter().rev().collect::<Vec<_>>().join(", ");
    let expected: Vec<String> = rows
        .into_iter()
        .map(|(name, (kind, roles, labels, help))| {
            format!(
                "| `{name}` | {kind} | {} | {} | {help} |",
                join(roles),
                join(labels)
            )
        })
        .collect();
    let manual =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md")).unwrap();
    let listed: Vec<&str> = manual
        .lines()
        .filter(|line| line.starts_with("| `sprat_"))
        .collect();
    assert_eq!(
        listed,
        expected,
        "docs/metrics.md should be\n{}",
        expected.join("\n")
    );
}
