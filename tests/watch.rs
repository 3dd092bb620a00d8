//! `cohort watch` in a terminal: what is on the screen, what the keys do, and that the terminal is given back.

use serde_json::Value;

use crate::support::terminal::Terminal;
use crate::support::{Scene, signal, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";
/// Rows and columns of a usual terminal.
const USUAL: (u16, u16) = (24, 80);

/// The step that the screen shows, `step 12/600`.
fn step(screen: &str) -> Option<u64> {
    let (_, rest) = screen.lines().next()?.split_once(" step ")?;
    rest.split_once('/')?.0.parse().ok()
}

/// Waits until the screen shows a later step than `before`; gives it.
fn rising(terminal: &mut Terminal, before: u64) -> u64 {
    let later = |screen: &str| step(screen) > Some(before);
    let screen = terminal.wait_until(&format!("step after {before}"), later);
    step(&screen).expect("just seen")
}

fn status(scene: &Scene, run: &str) -> Value {
    scene.events(&format!("status {run}")).remove(0)["status"].clone()
}

/// A screen without what differs from run to run: numbers, curves, and the space that they leave.
fn masked(screen: &str) -> String {
    let mut lines = Vec::new();
    for line in screen.lines() {
        let mut out = String::new();
        for letter in line.chars() {
            let letter = match letter {
                '0'..='9' => '#',
                '\u{2800}'..='\u{28ff}' | '◆' => ' ',
                other => other,
            };
            let repeats = matches!(letter, '#' | ' ' | '─' | '█' | '░') && out.ends_with(letter);
            if !repeats {
                out.push(letter);
            }
        }
        // `12.3k` and `123` are numbers alike.
        for (number, plain) in [("#.#", "#"), ("#k", "#"), ("#min", "#s"), ("#e-#", "#")] {
            out = out.replace(number, plain);
        }
        lines.push(out.trim_end().to_owned());
    }
    lines.join("\n")
}

#[test]
fn a_live_run_is_watched_paused_resumed_and_left_alone() {
    let scene = Scene::new();
    let (_coordinator, url) = scene.coordinator("");
    let _worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ));
    let mut watch = Terminal::start(&scene, "watch", USUAL);
    watch.wait_for("no runs yet");
    let long = format!(
        "{TRAIN} --set train.steps=600 --set train.eval_every=200 --set checkpoint.every=0"
    );
    scene.run(&format!("{long} --detach --name live"));
    let first = rising(&mut watch, 0);
    rising(&mut watch, first);
    assert!(watch.has_colours());

    watch.press("p");
    watch.wait_for("Pause live?");
    watch.press("y");
    watch.wait_for("live is paused at step");
    let paused = watch.wait_until("the status", |screen| {
        screen
            .lines()
            .next()
            .is_some_and(|line| line.contains("live  paused"))
    });
    assert_eq!(status(&scene, "live"), "paused");

    watch.press("c");
    watch.wait_for("Cancel live?");
    watch.press("n");
    watch.wait_until("an answered question", |screen| {
        !screen.contains("Cancel live?")
    });

    watch.press("?");
    watch.wait_for("list of runs; Enter chooses");
    watch.press(" ");
    watch.wait_until("no help", |screen| !screen.contains("Enter chooses"));
    watch.resize(12, 40);
    let small = watch.wait_until("a small screen", |screen| {
        screen.contains(" loss ") && screen.lines().count() <= 12
    });
    assert!(
        small.lines().all(|line| line.chars().count() <= 40),
        "{small}"
    );
    watch.press("\t");
    watch.wait_for(" workers ");
    watch.resize(40, 120);
    watch.wait_until("all panels", |screen| {
        [
            " loss ",
            " gradient norm ",
            " workers ",
            " events ",
            " checkpoints ",
        ]
        .iter()
        .all(|panel| screen.contains(panel))
    });

    watch.press("uy");
    rising(&mut watch, step(&paused).expect("it was paused at a step"));
    watch.press("q");
    assert_eq!(watch.wait(), Some(0), "{}", watch.shown());
    watch.assert_given_back();
    let said = watch.shown();
    assert!(said.contains("left live, which goes on"), "{said}");
    let end = scene.events("follow live").pop().expect("an event");
    assert_eq!(
        (&end["event"], &end["step"]),
        (&"finished".into(), &600.into())
    );
}

#[test]
fn a_finished_run_is_shown_from_the_home_directory() {
    let scene = Scene::new();
    scene.run(&format!("{TRAIN} --local 1 --name done"));
    let mut watch = Terminal::start_with(&scene, "watch done", USUAL, &[("NO_COLOR", "1")]);
    // The curves come after the events.
    let screen = watch.wait_until("the run", |screen| {
        ["finished after step 12", "best", " learning rate "]
            .iter()
            .all(|part| screen.contains(part))
    });
    let home = scene.path("home").display().to_string();
    // The path of the home directory may be cut.
    let foot = screen.lines().last().expect("a foot");
    assert!(foot.contains("no coordinator runs"), "{foot}");
    let screen = screen
        .replace(foot, " no coordinator runs ...")
        .replace(&home, "[HOME]");
    insta::assert_snapshot!(masked(&screen));
    assert!(!watch.has_colours());
    // Nothing can be paused that rests.
    watch.press("p");
    watch.wait_for("done is finished; there is nothing to pause");
    watch.press("\u{3}");
    assert_eq!(watch.wait(), Some(0), "{}", watch.shown());
    watch.assert_given_back();
    // Not a terminal: words.
    let said = text(&scene.run("watch").stdout);
    assert!(
        said.starts_with("done: finished at step 12 of 12"),
        "{said}"
    );
    let said = scene.fails("watch nobody");
    assert!(said.contains("there is no run `nobody`"), "{said}");
}

#[test]
fn a_coordinator_that_is_started_again_is_found_again() {
    let scene = Scene::new();
    let (mut coordinator, url) = scene.coordinator("");
    let _worker = scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ));
    let long = format!("{TRAIN} --set train.steps=2000");
    scene.run(&format!("{long} --detach --name cut"));
    let mut watch = Terminal::start(&scene, "watch cut", USUAL);
    let before = rising(&mut watch, 0);
    coordinator.kill();
    watch.wait_for("coordinator");
    let port = url.rsplit(':').next().expect("a port");
    let mut again = scene.start(&format!("coordinator --listen 127.0.0.1:{port}"));
    again.wait_for("http://");
    watch.wait_for("a coordinator answers now");
    rising(&mut watch, before);
    // Whatever ends it, the terminal is given back.
    signal::send(watch.pid(), signal::Signal::Terminate);
    assert_eq!(watch.wait(), Some(0), "{}", watch.shown());
    watch.assert_given_back();
    scene.run("cancel cut");
}
