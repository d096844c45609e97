//! The operator's page of a tracker, as a browser or a curious program on this machine meets it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use serde_json::Value;

use crate::{
    process::{PATIENCE, wait_until},
    swarm::{MIB, Swarm, TRACKER},
};

/// An answer: its status, its head in lower case, and its body.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

fn page(swarm: &mut Swarm) -> SocketAddr {
    let said = swarm.running(TRACKER).stdout();
    let started: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    started["operator"].as_str().unwrap().parse().unwrap()
}

fn send(at: SocketAddr, path: &str, host: &str) -> TcpStream {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    stream
}

fn ask_as(at: SocketAddr, path: &str, host: &str) -> Answer {
    let mut text = Vec::new();
    send(at, path, host).read_to_end(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

fn ask(at: SocketAddr, path: &str) -> Answer {
    ask_as(at, path, &at.to_string())
}

#[track_caller]
fn json(at: SocketAddr, path: &str) -> Value {
    let answer = ask(at, path);
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

/// Reads events until one is as wanted.
fn follow(stream: &mut TcpStream, what: &str, wanted: impl Fn(&Value) -> bool) {
    let mut text = Vec::new();
    wait_until(what, PATIENCE, || {
        let mut block = [0; 16 << 10];
        let n = stream.read(&mut block).unwrap();
        assert!(
            n > 0,
            "the stream ended: {}",
            String::from_utf8_lossy(&text)
        );
        text.extend_from_slice(&block[..n]);
        // Chunk lengths stand between; an event's data is one line.
        let events = String::from_utf8_lossy(&text).into_owned();
        let mut data = events
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        data.any(|data| serde_json::from_str(data).is_ok_and(|event| wanted(&event)))
            .then_some(())
    });
}

#[test]
fn the_page_is_whole_and_strict_and_has_nothing_beside_it() {
    let mut swarm = Swarm::start();
    let at = page(&mut swarm);
    let html = ask(at, "/");
    assert!(
        html.status == 200 && html.head.contains("content-type: text/html"),
        "{}",
        html.head
    );
    for header in [
        "script-src 'self'",
        "style-src 'self'",
        "default-src 'none'",
        "nosniff",
        "no-store",
    ] {
        assert!(html.head.contains(header), "{header}: {}", html.head);
    }
    for foreign in [
        "http:",
        "https:",
        "style=",
        "<style",
        "onclick",
        "javascript:",
    ] {
        assert!(!html.body.contains(foreign), "{foreign}");
    }
    let parts = html
        .body
        .split('"')
        .filter(|word| word.starts_with('/') && word.contains('.'));
    let parts: Vec<&str> = parts.collect();
    assert!(
        parts.contains(&"/app.css") && parts.contains(&"/app.js"),
        "{parts:?}"
    );
    for part in parts
        .into_iter()
        .chain(["/draw.js", "/table.js", "/words.js"])
    {
        assert_eq!(ask(at, part).status, 200, "{part}");
    }
    assert_eq!(ask_as(at, "/", "evil.example").status, 403);
    assert_eq!(ask_as(at, "/api/events", "evil.example").status, 403);
    for path in [
        "/../tracker.redb",
        "/%2e%2e/authority/ca.key",
        "/..%5cca.key",
        "//etc/passwd",
        "/app.js/",
        "/dashboard.rs",
    ] {
        assert_eq!(ask(at, path).status, 404, "{path}");
    }
}

#[test]
fn files_members_and_their_state_are_told_in_pages() {
    let mut swarm = Swarm::start();
    let at = page(&mut swarm);
    let idle = json(at, "/api/now");
    assert_eq!(
        (&idle["members"]["online"], &idle["files"]["files"]),
        (&Value::from(0), &Value::from(0))
    );
    assert_eq!(json(at, "/api/files")["rows"], Value::Array(vec![]));

    let hostile = "<img src=x onerror=alert(1)>\u{200d}.txt";
    swarm.write(&format!("a-files/{hostile}"), 5, "hostile");
    let id = swarm.write("a-files/film.mkv", MIB, "film");
    swarm.write("b-files/copy of film.mkv", MIB, "film");
    let a = swarm.sharing_peer("a", &[]);
    swarm.sharing_peer("b", &[]);
    swarm.wait_listed("a", "film.mkv", 2);
    let away = swarm.join("c");

    let all = wait_until("the page sees the files", PATIENCE, || {
        let all = json(at, "/api/files?sort=size");
        (all["matching"] == 3).then_some(all)
    });
    assert_eq!(all["rows"][0]["name"], hostile, "as it is, for a program");
    let found = json(at, "/api/files?text=FILM&only=all&descending=true&limit=1");
    assert_eq!(
        (&found["matching"], &found["rows"][0]["name"]),
        (&Value::from(2), &Value::from("film.mkv"))
    );
    assert_eq!(
        (
            &found["rows"][0]["complete"],
            &found["rows"][0]["content_id"]
        ),
        (&Value::from(2), &Value::from(&*id))
    );
    assert_eq!(
        json(at, &format!("/api/files?text={}&offset=1", &id[..16]))["rows"][0]["name"],
        "film.mkv"
    );
    assert_eq!(json(at, "/api/files?only=last")["matching"], 1);
    let last = json(at, "/api/files?sort=size&limit=2&offset=99999999");
    assert_eq!(
        (&last["offset"], &last["rows"][0]),
        (&Value::from(2), &all["rows"][2]),
        "the last page"
    );
    assert_eq!(
        json(at, "/api/files?text=nothing&offset=99")["rows"],
        Value::Array(vec![])
    );
    let held = json(at, &format!("/api/file?content_id={id}"));
    assert_eq!(
        (&held["n_sources"], held["names"].as_array().unwrap().len()),
        (&Value::from(2), 2)
    );
    for bad in [
        "/api/files?sort=<b>",
        "/api/files?offset=-1",
        "/api/file",
        "/api/file?content_id=x",
        "/api/members?state=x",
    ] {
        assert_eq!(ask(at, bad).status, 400, "{bad}");
    }
    assert_eq!(
        ask(at, &format!("/api/file?content_id={}", "0".repeat(64))).status,
        404
    );

    let now = wait_until("the page sees the members", PATIENCE, || {
        let now = json(at, "/api/now");
        (now["members"]["unseen"] == 1).then_some(now)
    });
    assert_eq!(
        (&now["files"]["copies"], &now["members"]["online"]),
        (&serde_json::json!([0, 1, 1, 0, 0]), &Value::from(2))
    );
    let rows = json(at, "/api/members")["rows"].clone();
    assert_eq!(
        (&rows[0]["state"], &rows[2]["state"], &rows[2]["peer_id"]),
        (&"online".into(), &"unseen".into(), &away.into())
    );
    assert_eq!(
        json(at, &format!("/api/members?text={}&state=online", &a[..12]))["matching"],
        1
    );
    swarm.run(TRACKER, ["tracker", "revoke", &a]).ok();
    wait_until("the page sees the revocation", PATIENCE, || {
        (json(at, "/api/members?state=revoked")["rows"][0]["peer_id"] == *a).then_some(())
    });
}

#[test]
fn transfers_are_followed_as_they_happen() {
    let mut swarm = Swarm::start();
    let at = page(&mut swarm);
    swarm.write("a-files/film.mkv", 8 * MIB, "film");
    let a = swarm.sharing_peer("a", &["--upload-limit", "1MiB"]);
    swarm.join("b");
    let b = swarm.start_peer("b", &["--downloads", "b-downloads"]);
    swarm.wait_listed("b", "film.mkv", 1);
    wait_until("the tracker knows from where to count", PATIENCE, || {
        (json(at, &format!("/api/members?text={b}"))["rows"][0]["bytes_received"] == 0)
            .then_some(())
    });
    let mut events = send(at, "/api/events", &at.to_string());
    let get = swarm.spawn("b", ["get", "film.mkv"]);
    follow(&mut events, "an event tells of the transfer", |now| {
        let transfer = &now["swarm"]["transfers"][0];
        let source = &transfer["sources"][0];
        transfer["peer_id"] == *b
            && transfer["name"] == "film.mkv"
            && source["peer_id"] == *a
            && source["rate"] != 0
    });
    get.finish(PATIENCE).ok();
    follow(&mut events, "an event tells that it is over", |now| {
        now["swarm"]["n_transfers"] == 0
    });
    let delivered = || {
        json(at, "/api/history")["bytes"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_u64)
            .sum::<u64>()
    };
    wait_until("the history has every byte", PATIENCE, || {
        (delivered() == 8 * MIB).then_some(())
    });
}

#[test]
fn only_so_many_follow_and_a_place_is_given_back() {
    let mut swarm = Swarm::start();
    let at = page(&mut swarm);
    let host = at.to_string();
    let begin = |_| {
        let mut stream = send(at, "/api/events", &host);
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
        stream
    };
    let mut following: Vec<TcpStream> = (0..32).map(begin).collect();
    let refused = ask(at, "/api/events");
    assert!(
        refused.status == 503 && refused.head.contains("retry-after"),
        "{}",
        refused.head
    );
    assert_eq!(
        ask(at, "/api/now").status,
        200,
        "the others are served all the same"
    );
    drop(following.pop());
    wait_until("the place of one who went is free", PATIENCE, || {
        let mut stream = send(at, "/api/events", &host);
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        (&status == b"HTTP/1.1 200").then_some(())
    });
    drop(following);
}
