//! Strangers and worse: thousands of connections that are silent, slow, endless or nonsense, while a run trains.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Process, Scene, finished, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt --set train.steps=300 --set train.eval_every=0 --set checkpoint.every=0";

/// What a connection says.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// Nothing.
    Silent,
    /// Random bytes.
    Garbage,
    /// The beginning of a request of HTTP/1, and more headers now and then, without an end.
    Slow,
    /// The beginning of TLS, and nothing more.
    HalfTls,
    /// The preface of HTTP/2 and a header frame that claims 16 MB.
    LargeFrame,
    /// A call without a token whose message claims 4 GB.
    LargeMessage,
}

const MANNERS: [Manner; 6] = [
    Manner::Silent,
    Manner::Garbage,
    Manner::Slow,
    Manner::HalfTls,
    Manner::LargeFrame,
    Manner::LargeMessage,
];

fn first_words(manner: Manner, number: u32) -> Vec<u8> {
    let random = |count: usize| {
        let mut state = number.wrapping_mul(2_654_435_761) | 1;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as u8
            })
            .collect::<Vec<u8>>()
    };
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    match manner {
        Manner::Silent => Vec::new(),
        Manner::Garbage => random(4096),
        Manner::Slow => b"GET / HTTP/1.1\r\nhost: localhost\r\n".to_vec(),
        // A record of a handshake that claims 512 bytes.
        Manner::HalfTls => [&[22, 3, 1, 2, 0, 1, 0, 1, 252][..], &random(40)].concat(),
        Manner::LargeFrame => {
            let claims = [0xff, 0xff, 0xff, 1, 4, 0, 0, 0, 1];
            [&preface[..], &settings, &claims, &random(200)].concat()
        }
        Manner::LargeMessage => b"POST /cohort.v1.Client/Submit HTTP/1.1\r\nhost: localhost\r\n\
            content-type: application/grpc\r\ncontent-length: 4294967300\r\n\r\n\0\xff\xff\xff\xff"
            .to_vec(),
    }
}

/// Opens so many connections of each manner and keeps them until they are closed from the other side or dropped.
fn besiege(address: &str, each: u32) -> Vec<(Manner, TcpStream)> {
    let mut open = Vec::new();
    for number in 0..each {
        for manner in MANNERS {
            let Ok(mut stream) = TcpStream::connect(address) else {
                continue;
            };
            let _ = stream.set_nonblocking(true);
            // A server that has closed it already is right.
            let _ = stream.write(&first_words(manner, number));
            open.push((manner, stream));
        }
    }
    open
}

/// Says a little more on the slow ones, and takes what comes, until a moment.
fn go_on(besiegers: &mut [(Manner, TcpStream)], until: impl Fn() -> bool) {
    while !until() {
        for (manner, stream) in besiegers.iter_mut() {
            if matches!(manner, Manner::Slow) {
                let _ = stream.write(b"x-more: and more\r\n");
            }
            let _ = stream.read(&mut [0; 1024]);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Largest resident memory of a process so far, in megabytes.
fn peak_mb(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid()));
    let status = status.expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kb = line.and_then(|line| line.split_whitespace().nth(1));
    kb.and_then(|kb| kb.parse::<u64>().ok()).expect("a number") / 1024
}

fn train(scene: &Scene, url: &str) -> Value {
    let run = format!("{TRAIN} --new --coordinator {url} --set train.min_workers=2");
    finished(&scene.events(&run)).clone()
}

fn siege(scene: &Scene, (coordinator, url): (Process, String)) {
    let line = format!("worker --coordinator {url} --threads 1 --no-shared-memory");
    let mut workers = [(); 2].map(|()| scene.start(&line));
    workers
        .iter_mut()
        .for_each(|worker| drop(worker.wait_for("joined")));
    // The corpus is prepared, and all is in memory.
    train(scene, &url);
    let undisturbed = Instant::now();
    let before = train(scene, &url);
    let undisturbed = undisturbed.elapsed();
    let peak_before = peak_mb(&coordinator);

    let (_, address) = url.split_once("://").expect("an address");
    let each = 1200 / MANNERS.len() as u32;
    let mut besiegers = besiege(address, each);
    let disturbed = Instant::now();
    let after = std::thread::scope(|threads| {
        let training = threads.spawn(|| train(scene, &url));
        go_on(&mut besiegers, || training.is_finished());
        training.join().expect("it trains")
    });
    let disturbed = disturbed.elapsed();
    assert_eq!(after["state_hash"], before["state_hash"]);
    let peak = peak_mb(&coordinator);
    println!(
        "{} connections: {undisturbed:.1?} undisturbed, {disturbed:.1?} besieged; the coordinator's peak {peak_before} MB, then {peak} MB",
        besiegers.len()
    );
    assert!(peak < peak_before + 150, "{peak_before} MB, then {peak} MB");
    // Somebody who may come in does, while they are still there.
    let seen = text(&scene.run(&format!("runs --coordinator {url}")).stdout);
    assert!(seen.contains("finished"), "{seen}");
}

#[test]
fn a_run_does_not_mind_a_thousand_strangers() {
    let scene = Scene::new();
    siege(&scene, scene.coordinator(""));
}

#[test]
fn nor_does_an_encrypted_one() {
    let scene = Scene::new();
    scene.run("init");
    siege(&scene, scene.coordinator(""));
}

/// Files that may be open are fewer than strangers that come.
#[test]
fn nor_one_with_few_open_files() {
    let scene = Scene::new();
    siege(&scene, scene.coordinator_limited("ulimit -n 256"));
}

/// Workers for whose connections there are no files are refused, and told what to raise.
#[test]
fn a_worker_too_many_is_told_why() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator_limited("ulimit -n 164");
    let line = format!("worker --coordinator {url} --threads 1 --no-shared-memory");
    let mut first = scene.start(&line);
    first.wait_for("joined");
    let message = scene.fails(&line);
    let expected = "this coordinator has as many workers as it can have, 1: each takes 3 connections, and it may have 164 files open";
    assert!(message.contains(expected), "{message}");
}
