//! What a run writes while it trains: the same whoever writes it, whatever happens to the workers, and without a trace in
//! the weights.

use std::io::Write;
use std::process::Stdio;

use rusqlite::Connection;
use serde_json::Value;

use crate::support::{Process, Scene, finished, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt";
const PROMPTS: &str = "--sample-prompt the --sample-prompt lane";

/// What a run has written, from the database: step, place of the prompt, prompt, text.
type Written = Vec<(u64, u32, String, String)>;

fn written(scene: &Scene, run: &str) -> Written {
    let database = scene.path("home").join("cohort.db");
    let connection = Connection::open(database).expect("it is a database");
    let sql =
        "SELECT step, prompt, prompt_text, text FROM samples WHERE run = ?1 ORDER BY step, prompt";
    let mut statement = connection.prepare(sql).expect("the table is there");
    let rows = statement.query_map([run], |row| {
        let step: i64 = row.get(0)?;
        Ok((step as u64, row.get(1)?, row.get(2)?, row.get(3)?))
    });
    let rows: Result<Written, _> = rows.expect("it can be read").collect();
    rows.expect("rows of that kind")
}

fn places(written: &Written) -> Vec<(u64, u32)> {
    written.iter().map(|row| (row.0, row.1)).collect()
}

/// What the events of a run say was written.
fn told(events: &[Value]) -> Written {
    let samples = events.iter().filter(|event| event["event"] == "sample");
    let row = |event: &Value| {
        let text = |name: &str| event[name].as_str().expect("a text").to_owned();
        let step = event["step"].as_u64().expect("a step");
        let index = event["index"].as_u64().expect("an index") as u32;
        (step, index, text("prompt"), text("text"))
    };
    samples.map(row).collect()
}

fn worker(scene: &Scene, url: &str) -> Process {
    scene.start(&format!(
        "worker --coordinator {url} --threads 1 --home cache"
    ))
}

#[test]
fn any_number_of_workers_writes_the_same_and_it_leaves_no_trace_in_the_weights() {
    let scene = Scene::new();
    let plain = scene.finished(&format!("{TRAIN} --local 1 --name plain"));
    let one = scene.events(&format!("{TRAIN} {PROMPTS} --new --local 1 --name one"));
    let two = scene.events(&format!("{TRAIN} {PROMPTS} --new --local 2 --name two"));
    for events in [&one, &two] {
        assert_eq!(finished(events)["state_hash"], plain["state_hash"]);
        assert_eq!(finished(events)["val_loss"], plain["val_loss"]);
    }
    let rows = written(&scene, "one");
    let due = [(0, 0), (0, 1), (6, 0), (6, 1), (12, 0), (12, 1)];
    assert_eq!(places(&rows), due);
    assert!(
        rows.iter()
            .all(|row| row.2 == ["the", "lane"][row.1 as usize])
    );
    assert!(rows.iter().all(|row| !row.3.is_empty()), "{rows:?}");
    assert_ne!(rows[2].3, rows[4].3, "another state and other draws");
    assert_eq!(told(&one), rows);
    assert_eq!(
        (written(&scene, "two"), told(&two)),
        (rows.clone(), rows.clone())
    );
    assert_eq!(written(&scene, "plain"), []);

    let status = scene.events("status one").remove(0);
    let newest = status["samples"].as_array().expect("a list");
    assert_eq!(newest.len(), 2);
    assert_eq!(newest[1]["step"], 12);
    assert_eq!(newest[1]["text"], rows[5].3);
    let said = text(&scene.run("status one").stdout);
    assert!(said.contains("written at step 12\n  after the\n"), "{said}");
    // With other prompts, or none, it is the same run.
    for prompts in ["", "--sample-prompt a"] {
        let said = scene.fails(&format!("{TRAIN} --local 1 --name one {prompts}"));
        assert!(said.contains("has finished its 12 steps"), "{said}");
    }
}

#[test]
fn what_the_last_state_writes_is_what_its_checkpoint_writes() {
    let scene = Scene::new();
    let spec = std::fs::read_to_string(scene.path("spec.toml")).expect("a spec");
    // Longer than the context, and at every second validation.
    let samples =
        "[samples]\nprompts = [\"the lane\", \"\"]\ntokens = 50\ntemperature = 0\nevery = 2\n";
    scene.write("spec.toml", &format!("{spec}\n{samples}"));
    let run = scene.events(&format!(
        "{TRAIN} --set train.eval_every=3 --local 2 --name run"
    ));
    let rows = written(&scene, "run");
    let due = [(0, 0), (0, 1), (6, 0), (6, 1), (12, 0), (12, 1)];
    assert_eq!(places(&rows), due);
    assert_eq!(told(&run), rows);
    for (prompt, row) in [("the lane", &rows[4]), ("", &rows[5])] {
        let mut command = scene.cohort("generate --from run@12 --max-tokens 50 --temperature 0");
        let output = command.args(["--prompt", prompt]).output();
        let output = output.expect("the binary runs");
        assert_eq!(text(&output.stdout), format!("{prompt}{}\n", row.3));
    }
    // Adapters and the weights behind them write together.
    let tune =
        "finetune --from run --corpus text.txt --lora 4 --set train.steps=6 --sample-prompt the";
    scene.events(&format!(
        "{tune} --set samples.temperature=0 --local 2 --name tuned"
    ));
    let rows = written(&scene, "tuned");
    assert_eq!(places(&rows), [(0, 0), (6, 0)]);
    for row in rows {
        let from = if row.0 == 0 { "run@12" } else { "tuned@6" };
        let generate =
            format!("generate --from {from} --prompt the --max-tokens 48 --temperature 0");
        let output = scene.run(&generate).stdout;
        assert_eq!(text(&output), format!("the{}\n", row.3), "{from}");
    }
    // Two short lines tell of a long text.
    let run = format!("{TRAIN} --set samples.prompts=the --set samples.tokens=900 --new --local 1");
    let said = text(&scene.run(&run).stderr);
    let at = said.find("step 12: after the\n").expect("it is told");
    let line = said[at..].lines().nth(1).expect("a second line");
    assert!(line.chars().count() <= 100 && line.ends_with('…'), "{line}");
}

#[test]
fn workers_that_are_killed_change_nothing_that_is_written() {
    let scene = Scene::new();
    let long = "--set train.steps=240 --set train.eval_every=8 --set checkpoint.every=0";
    let long = format!("{TRAIN} {long} {PROMPTS} --set samples.tokens=30");
    let whole = scene.events(&format!("{long} --local 1 --name whole"));
    let rows = written(&scene, "whole");
    assert_eq!(rows.len(), 2 * (240 / 8 + 1));
    assert_eq!(told(&whole), rows);

    let (_coordinator, url) = scene.coordinator("");
    let mut first = worker(&scene, &url);
    let mut second = worker(&scene, &url);
    for worker in [&mut first, &mut second] {
        worker.wait_for("joined");
    }
    let mut run = scene.start(&format!(
        "{long} --new --name cut --set train.min_workers=2 --json"
    ));
    run.wait_for("\"sample\"");
    second.kill();
    run.wait_for_step(40);
    let _third = worker(&scene, &url);
    // It has the state, and lanes.
    run.wait_for("\"worker_joined\"");
    first.kill();
    let end = run.wait_for("\"finished\"");
    let end: Value = serde_json::from_str(&end).expect("an event");
    assert_eq!(end["state_hash"], finished(&whole)["state_hash"]);
    assert_eq!(written(&scene, "cut"), rows);
}

#[test]
fn a_run_that_goes_on_may_have_other_prompts() {
    let scene = Scene::new();
    let long = format!("{TRAIN} --set train.steps=300 --set train.eval_every=50");
    let whole = scene.events(&format!("{long} {PROMPTS} --local 1 --name whole"));
    let (mut coordinator, url) = scene.coordinator("");
    let first = worker(&scene, &url);
    let mut run = scene.start(&format!("{long} {PROMPTS} --new --name cut --json"));
    run.wait_for_step(110);
    scene.run("pause cut");
    assert_eq!(run.wait(), Some(130), "{}", run.printed());
    coordinator.kill();
    drop(first);
    let early = written(&scene, "cut");
    let step = scene.events("status cut").remove(0)["step"].as_u64();
    let step = step.expect("a step");

    let said = scene.fails("pretrain --resume cut --set samples.tokens=0 --local 1");
    assert!(said.contains("`samples.tokens` is 0, but"), "{said}");
    let resume = "pretrain --resume cut --sample-prompt the --sample-prompt tree --local 2";
    let end = scene.finished(resume);
    assert_eq!(end["state_hash"], finished(&whole)["state_hash"]);
    let (now, whole) = (written(&scene, "cut"), written(&scene, "whole"));
    assert_eq!(now[..early.len()], early, "what was written stays");
    assert_eq!(now.len(), whole.len());
    for (row, other) in now.iter().zip(&whole) {
        match row.1 == 0 || row.0 <= step {
            true => assert_eq!(row, other),
            false => assert_eq!((row.0, row.2.as_str()), (other.0, "tree")),
        }
    }
    let end = scene
        .finished("pretrain --resume cut --set train.steps=310 --set samples.prompts=[] --local 1");
    assert_eq!(end["step"], 310);
    assert_eq!(written(&scene, "cut"), now, "it writes no more");
}

#[test]
fn a_prompt_that_cannot_be_written_after_leaves_no_run_behind() {
    let scene = Scene::new();
    let says = |flags: &str| scene.fails(&format!("{TRAIN} --local 1 {flags}"));
    let said = says(&format!("--sample-prompt {}", "Zx9".repeat(40)));
    let problem = "the model's context is 32; take a shorter one";
    assert!(
        said.contains("prompt 1 of `samples.prompts`, \"Zx9") && said.contains(problem),
        "{said}"
    );
    let said = says("--set tokenizer={kind=\"char\"} --sample-prompt the --sample-prompt été");
    assert!(
        said.contains("prompt 2 of `samples.prompts`, \"été\"") && said.contains('é'),
        "{said}"
    );
    assert_eq!(scene.events("runs"), [] as [Value; 0]);
    scene.write(
        "labelled.jsonl",
        &(0..40)
            .map(|n| format!("{{\"text\": \"the lane {n}\", \"label\": \"{}\"}}\n", n % 2))
            .collect::<String>(),
    );
    let classify = "pretrain spec.toml --classify labelled.jsonl --set corpus.split=document --local 1 --sample-prompt the";
    let said = scene.fails(classify);
    assert!(said.contains("a classifier has no head for text"), "{said}");
}

#[test]
fn a_model_of_conversations_is_asked_as_chat_asks_it() {
    let scene = Scene::new();
    let line = |n: usize| {
        let answer = ["the root", "a tree", "two lanes"][n % 3];
        format!("{{\"prompt\": \"the lane {n}\", \"response\": \"{answer}\"}}\n")
    };
    scene.write("pairs.jsonl", &(0..200).map(line).collect::<String>());
    let base = format!("{TRAIN} --set model.context=64 --local 1 --name base");
    scene.finished(&base);
    let tune = "finetune --from base --sft pairs.jsonl --set train.steps=40 --set train.eval_every=20 \
                --set train.learning_rate=0.01 --set samples.temperature=0 --sample-prompt lane";
    let tuned = scene.events(&format!("{tune} --local 2 --name tuned"));
    let rows = written(&scene, "tuned");
    assert_eq!(places(&rows), [(0, 0), (20, 0), (40, 0)]);
    assert_eq!(told(&tuned), rows);

    let mut child = scene
        .cohort("chat --from tuned@40 --max-tokens 48 --temperature 0 --threads 1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(b"lane\n").expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(text(&output.stdout).trim(), rows[2].3);
    assert_ne!(rows[0].3, rows[2].3, "it has learned to answer");
}
