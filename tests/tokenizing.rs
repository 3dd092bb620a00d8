//! Text becomes tokens on whoever is there: the corpus is the same, whoever dies meanwhile, and what was done counts.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::support::{Process, Scene};

const PREPARE: &str = "corpus prepare long.txt --vocab-size 600";

/// Words of which none comes twice, so that each has to be encoded: it takes seconds.
fn scene() -> Scene {
    let scene = Scene::new();
    let mut state = 7u64;
    let mut text = String::new();
    while text.len() < 2_500_000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        text.push_str(&format!("{:x}", state >> 20));
        text.push(if state.is_multiple_of(11) { '\n' } else { ' ' });
    }
    scene.write("long.txt", &text);
    scene
}

fn worker(scene: &Scene, url: &str) -> Process {
    let line = format!("worker --coordinator {url} --threads 1 --home cache");
    let mut worker = scene.start(&line);
    worker.wait_for("joined");
    worker
}

/// The fingerprint of the corpus that a command ends with.
fn prepared(scene: &Scene, url: &str) -> String {
    let events = scene.events(&format!("{PREPARE} --coordinator {url}"));
    let last = events.last().expect("a corpus");
    last["fingerprint"].as_str().expect("it has one").to_owned()
}

/// The fingerprint without a worker.
fn alone() -> &'static String {
    static ALONE: OnceLock<String> = OnceLock::new();
    ALONE.get_or_init(|| prepared_by(0))
}

fn prepared_by(workers: usize) -> String {
    let scene = scene();
    let (mut coordinator, url) = scene.coordinator("");
    let workers: Vec<Process> = (0..workers).map(|_| worker(&scene, &url)).collect();
    let fingerprint = prepared(&scene, &url);
    for mut worker in workers {
        worker.kill();
        coordinator.wait_for("has tokenized");
    }
    fingerprint
}

/// Waits until a part of the text is encoded and written down.
fn wait_until_under_way(scene: &Scene) {
    let corpora = scene.path("home").join("corpora");
    let deadline = Instant::now() + Duration::from_secs(120);
    let kept = |entry: std::io::Result<std::fs::DirEntry>| -> Option<(PathBuf, u64)> {
        let entry = entry.ok()?;
        Some((entry.path(), entry.metadata().ok()?.len()))
    };
    loop {
        let entries = std::fs::read_dir(&corpora).into_iter().flatten();
        let is_kept = |(path, bytes): &(PathBuf, u64)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(".kept-") && *bytes > 500_000
        };
        if entries.filter_map(kept).any(|file| is_kept(&file)) {
            return;
        }
        assert!(Instant::now() < deadline, "nothing is encoded");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_corpus_does_not_depend_on_who_tokenizes() {
    let alone = alone();
    assert_eq!(&prepared_by(1), alone);
    assert_eq!(&prepared_by(2), alone);

    // And on who dies meanwhile.
    let scene = scene();
    let (mut coordinator, url) = scene.coordinator("");
    let mut first = worker(&scene, &url);
    let _second = worker(&scene, &url);
    let mut preparing = scene.start(&format!("{PREPARE} --coordinator {url} --json"));
    wait_until_under_way(&scene);
    first.kill();
    assert_eq!(preparing.wait(), Some(0), "{}", coordinator.tail(20));
    assert!(preparing.printed().contains(alone));
    coordinator.wait_for("has tokenized");
}

#[test]
fn a_preparation_that_was_cut_off_goes_on_where_it_was() {
    let scene = scene();
    let (mut coordinator, url) = scene.coordinator("");
    let mut preparing = scene.start(&format!("{PREPARE} --coordinator {url} --json"));
    wait_until_under_way(&scene);
    coordinator.kill();
    assert_eq!(preparing.wait(), Some(1));
    let (mut coordinator, url) = scene.coordinator("");
    assert_eq!(&prepared(&scene, &url), alone());
    coordinator.wait_for("went on where a preparation was cut off");
    let left = std::fs::read_dir(scene.path("home").join("corpora")).expect("there is a corpus");
    let names = left.map(|entry| entry.expect("a name").file_name());
    let kept = names.filter(|name| name.to_string_lossy().starts_with(".kept-"));
    assert_eq!(kept.count(), 0, "what was kept is not needed any more");
}
