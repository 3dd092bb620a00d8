//! The web page, in a real browser, with real processes behind it. Each test ends with the same two demands: the console
//! said nothing, and no request went anywhere but to the coordinator.
//!
//! Without a `chromedriver` these tests say so and pass, unless `COHORT_REQUIRE_BROWSER=1`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::browser::{Browser, key};
use crate::support::cluster::{Cluster, RUN};
use crate::support::{Scene, on_a_quiet_machine, real_data};

/// Names the directory that pictures of the page are written to.
const PICTURES: &str = "COHORT_PAGE_PICTURES";

/// Between a worker's end and the page that shows it as lost.
const SHOWN_WITHIN: Duration = Duration::from_secs(2);

/// A run that does not end while it is looked at; a step takes a tenth of a second or so.
const LONG: &str = "pretrain spec.toml --corpus text.txt --set train.steps=100000 --set train.accumulate=12 \
                    --set train.eval_every=20 --set checkpoint.every=1000";

/// Expressions that the page is asked for.
mod ask {
    /// The step that the loss curve has come to.
    pub const STEP: &str = "Number(document.querySelector('.chart').getAttribute('aria-label')\
                            .match(/ at step ([0-9,]+)/)[1].replaceAll(',', ''))";
    /// The run's status in the headline.
    pub const STATUS: &str = "document.querySelector('.headline .badge').dataset.status";
    /// Whether nothing sticks out at the side.
    pub const FITS: &str =
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth";
}

/// A cluster with a run, and a browser that can look at it; `None` without a browser.
fn watched(scene: &Scene, workers: usize) -> Option<(Cluster<'_>, Browser)> {
    let browser = Browser::start()?;
    let mut cluster = Cluster::start(scene, workers);
    cluster.submit(LONG);
    browser.open(&format!("{}/runs/{RUN}", cluster.url()));
    browser.wait_for(&format!("{} >= 2", ask::STEP));
    Some((cluster, browser))
}

/// Nothing in the console, and no request to any other host.
fn assert_clean(browser: &Browser, url: &str) {
    assert_eq!(browser.console(), [""; 0], "the console is silent");
    assert_own_requests(browser, url);
}

fn assert_own_requests(browser: &Browser, url: &str) {
    let own = format!("{url}/");
    let requests = browser.requests();
    assert!(!requests.is_empty(), "the page was requested");
    for request in requests {
        assert!(request.starts_with(&own), "asked for {request}");
    }
}

/// Clicks a run's button and says yes.
fn act(browser: &Browser, verb: &str) {
    let button = format!("button[data-verb={verb}]");
    browser.wait_for(&format!("!document.querySelector('{button}').hidden"));
    browser.click(&button);
    browser.wait_for("document.querySelector('dialog').open");
    browser.click("#dialog-yes");
    browser.wait_for("!document.querySelector('dialog')");
}

#[test]
fn curves_move_while_a_run_trains() {
    let scene = Scene::new();
    let Some((cluster, browser)) = watched(&scene, 1) else {
        return;
    };
    let before = browser.run(&format!(
        "window.picture = document.querySelector('canvas').toDataURL(); return {}",
        ask::STEP
    ));
    let later = before.as_u64().expect("a step") + 5;
    browser.wait_for(&format!(
        "{} >= {later} && document.querySelector('canvas').toDataURL() !== window.picture",
        ask::STEP
    ));
    browser.wait_for("/^[0-9]+ % run, running/.test(document.title)");
    // The other pages live by the same stream.
    browser.click(".brand");
    browser.wait_for("document.querySelector('tbody .badge').dataset.status === 'running'");
    let before = browser.wait_for(ask::STEP).as_u64().expect("a step");
    browser.wait_for(&format!("{} > {before}", ask::STEP));
    assert_clean(&browser, &cluster.url());
}

#[test]
fn a_lost_worker_is_shown_with_its_cost_within_two_seconds() {
    let scene = Scene::new();
    let Some((mut cluster, browser)) = watched(&scene, 2) else {
        return;
    };
    browser.wait_for("document.querySelectorAll('#workers tbody tr').length === 2");
    // A step has just begun, so that both workers owe lanes. What the page shows is behind what happens.
    let step = browser.wait_for(ask::STEP).as_u64().expect("a step");
    cluster.wait_for_step(step + 5);
    let killed = Instant::now();
    cluster.workers[1].kill();
    let row = browser.wait_for(
        "/lost at step [0-9]+/.test(document.querySelector('tr[data-lost]').textContent) \
         && document.querySelector('tr[data-lost]').textContent",
    );
    let shown = killed.elapsed();
    eprintln!("the loss was shown {} ms after the kill", shown.as_millis());
    assert!(
        shown < on_a_quiet_machine(SHOWN_WITHIN),
        "{row} was shown after {shown:?}"
    );
    // What it had delivered already costs nothing.
    browser.wait_for(
        "/, ([+][0-9.]+ s|no delay)$/.test(document.querySelector('tr[data-lost]').textContent)",
    );
    browser.wait_for("document.querySelector('#events .kind.bad').textContent === 'worker lost'");
    let rows = browser.run("return document.querySelectorAll('#workers tbody tr').length");
    assert_eq!(rows, 2, "one that is lost and one that goes on");
    assert_clean(&browser, &cluster.url());
}

#[test]
fn a_run_is_paused_and_resumed_from_the_page_by_mouse_and_by_keyboard() {
    let scene = Scene::new();
    let Some((cluster, browser)) = watched(&scene, 1) else {
        return;
    };
    act(&browser, "pause");
    browser.wait_for(&format!("{} === 'paused'", ask::STATUS));
    browser.wait_for("document.querySelector('#checkpoints tbody tr')");
    let rested = browser.wait_for(ask::STEP).as_u64().expect("a step");
    act(&browser, "resume");
    browser.wait_for(&format!("{} === 'running'", ask::STATUS));
    browser.wait_for(&format!("{} > {rested}", ask::STEP));

    // By keyboard alone; Esc leaves everything as it is.
    for keys in [[key::ENTER, key::ESCAPE], [key::ENTER, key::ENTER]] {
        browser.run("document.querySelector('.skip').focus()");
        let tabs = (0..40).find(|_| {
            browser.press(&[key::TAB]);
            browser.run("return document.activeElement.dataset.verb") == "pause"
        });
        assert!(tabs.is_some(), "the button is reached by Tab");
        browser.press(&keys[..1]);
        browser.wait_for("document.querySelector('dialog').open");
        if keys[1] == key::ENTER {
            browser.press(&[key::TAB]);
        }
        browser.press(&keys[1..]);
        browser.wait_for("!document.querySelector('dialog')");
        let status = browser.run(&format!("return {}", ask::STATUS));
        if keys[1] == key::ESCAPE {
            assert_eq!(status, "running", "nobody said yes");
        }
    }
    browser.wait_for(&format!("{} === 'paused'", ask::STATUS));
    assert_clean(&browser, &cluster.url());
}

#[test]
fn nothing_sticks_out_on_a_phone() {
    let scene = Scene::new();
    let Some((mut cluster, browser)) = watched(&scene, 2) else {
        return;
    };
    cluster.workers[1].kill();
    browser.wait_for("document.querySelector('tr[data-lost]')");
    browser.size(360, 740, true);
    for page in [
        format!("/runs/{RUN}"),
        "/".into(),
        format!("/compare?run={RUN}"),
    ] {
        browser.open(&format!("{}{page}", cluster.url()));
        browser.wait_for(&format!("{} >= 2", ask::STEP));
        browser.run("document.querySelectorAll('details').forEach((each) => each.open = true)");
        browser.wait_for("document.querySelector('canvas').clientWidth > 200");
        let fits = browser.run(&format!("return {}", ask::FITS));
        assert_eq!(fits, true, "{page} is 360 pixels wide");
    }
    assert_clean(&browser, &cluster.url());
}

#[test]
fn two_runs_are_compared() {
    let scene = Scene::new();
    let Some(browser) = Browser::start() else {
        return;
    };
    let mut cluster = Cluster::start(&scene, 1);
    let url = cluster.url();
    for (name, rate) in [("one", "0.01"), ("other", "0.002")] {
        scene.run(&format!(
            "pretrain spec.toml --corpus text.txt --new --name {name} --set train.learning_rate={rate} --coordinator {url}"
        ));
    }
    browser.open(&url);
    for name in ["one", "other"] {
        browser.wait_for(&format!(
            "document.querySelector('[aria-label=\"Compare {name}\"]')"
        ));
        browser.click(&format!("[aria-label=\"Compare {name}\"]"));
    }
    browser.click("button.main");
    browser.wait_for("document.querySelectorAll('figure.wide .legend li').length === 4");
    let names = browser.run(
        "return [...document.querySelectorAll('figure.wide .legend li')].map((li) => li.textContent)",
    );
    let names: Vec<&str> = names
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    assert_eq!(
        names,
        ["one", "one, validation", "other", "other, validation"]
    );
    // The one follows from the other.
    let differs = browser.run(
        "return [...document.querySelectorAll('#differences tbody tr')].map((tr) => [...tr.cells].map((cell) => cell.textContent))",
    );
    assert_eq!(
        differs,
        serde_json::json!([
            ["train.learning_rate", "0.01", "0.002"],
            ["train.min_learning_rate", "0.001", "0.0002"],
        ])
    );
    let losses = browser.run(
        "return [...document.querySelectorAll('#figures tbody tr')].find((tr) => tr.cells[0].textContent === 'Loss').textContent",
    );
    let losses = losses.as_str().expect("text");
    assert_eq!(losses.matches('.').count(), 2, "two losses: {losses}");
    assert_clean(&browser, &url);
    cluster.workers[0].leave();
}

#[test]
fn the_page_goes_on_by_itself_after_the_coordinator_is_started_again() {
    let scene = Scene::new();
    let Some((mut cluster, browser)) = watched(&scene, 1) else {
        return;
    };
    browser.wait_for(&format!("{} >= 12", ask::STEP));
    assert_clean(&browser, &cluster.url());
    // What the reader has set must stay: a zoom, an open panel, the scroll position.
    browser.run(
        "document.querySelector('.chart').focus(); document.getElementById('spec').open = true",
    );
    browser.press(&[key::LEFT, "+"]);
    browser.run("document.getElementById('spec').scrollIntoView()");
    // What happened in the meantime stands above it, so the place is that of the panel in the window.
    let place = "return document.getElementById('spec').getBoundingClientRect().top";
    let kept = "return [document.getElementById('spec').open, \
                document.querySelector('.tools button.small').disabled]";
    let place_before = browser.run(place).as_f64().expect("a number");
    assert_eq!(browser.run(kept), serde_json::json!([true, false]));
    cluster.kill_coordinator();
    browser.wait_for("!document.getElementById('banner').hidden");
    let step = browser.run(&format!("return {}", ask::STEP));
    cluster.restart_coordinator();
    browser.wait_for("document.getElementById('banner').hidden");
    let later = step.as_u64().expect("a step") + 3;
    browser.wait_for(&format!("{} >= {later}", ask::STEP));
    assert_eq!(browser.run(kept), serde_json::json!([true, false]));
    let moved = browser.run(place).as_f64().expect("a number") - place_before;
    assert!(
        moved.abs() < 5.0,
        "what was read has moved by {moved} pixels"
    );
    // While it was gone the browser itself says so, and nobody else anything.
    for line in browser.console() {
        assert!(line.contains("net::ERR_"), "{line}");
    }
    assert_own_requests(&browser, &cluster.url());
}

#[test]
fn a_token_is_asked_for() {
    let scene = Scene::new();
    let Some(browser) = Browser::start() else {
        return;
    };
    scene.write("token", "a-token-of-many-letters-and-more\n");
    let (_coordinator, url) = scene.coordinator("--token-file token");
    browser.open(&url);
    browser.wait_for("document.activeElement.id === 'token'");
    assert_clean(&browser, &url);
    browser.type_text("wrong");
    browser.press(&[key::ENTER]);
    browser
        .wait_for("document.getElementById('token-error').textContent.includes('not the token')");
    // The browser itself reports the refusal.
    let said = browser.console();
    assert!(
        said.iter().all(|line| line.contains("401")) && said.len() == 1,
        "{said:?}"
    );
    browser.run("document.getElementById('token').value = ''");
    browser.type_text("a-token-of-many-letters-and-more");
    browser.press(&[key::ENTER]);
    browser.wait_for("document.querySelector('.empty').textContent.includes('No run yet')");
    browser.click("#sign-out");
    browser.wait_for("document.activeElement.id === 'token'");
    assert_clean(&browser, &url);
}

/// Pictures for docs/page.md, of a run of real text where that is at hand; only where `COHORT_PAGE_PICTURES` names the
/// directory that they go to.
#[test]
fn pictures() {
    let Some(directory) = std::env::var_os(PICTURES) else {
        return;
    };
    let directory = PathBuf::from(directory);
    let browser = Browser::start().expect("pictures need a browser");
    let scene = Scene::new();
    let mut cluster = Cluster::start(&scene, 3);
    let url = cluster.url();
    let text =
        real_data("shakespeare").map_or("text.txt".into(), |path| path.display().to_string());
    scene.run(&format!(
        "pretrain --preset nanogpt-shakespeare-cpu --corpus {text} --name shakespeare --coordinator {url} --detach \
         --set train.steps=600 --set train.eval_every=50 --set train.warmup_steps=20 --set checkpoint.every=100 --set train.eval_samples=64"
    ));
    browser.size(1280, 900, false);
    browser.open(&format!("{url}/runs/shakespeare"));
    browser.wait_for(&format!("{} >= 60", ask::STEP));
    cluster.workers[1].kill();
    browser.wait_for("document.querySelector('tr[data-lost]')");
    cluster.add_worker();
    for _ in 0..3 {
        // Each wait has its own deadline.
        let step = browser.wait_for(ask::STEP).as_u64().expect("a step");
        browser.wait_for(&format!("{} >= {}", ask::STEP, step + 80));
    }
    for (theme, width, height, name) in [
        ("light", 1280, 1500, "page-light.png"),
        ("dark", 1280, 1500, "page-dark.png"),
        ("dark", 360, 1200, "page-phone.png"),
    ] {
        browser.run(&format!("localStorage.setItem('cohort-theme', '{theme}')"));
        browser.size(width, height, width < 500);
        browser.open(&format!("{url}/runs/shakespeare"));
        browser.wait_for(&format!("{} >= 2", ask::STEP));
        let path = directory.join(name);
        std::fs::write(path, browser.screenshot()).expect("the picture is written");
    }
}
