//! Models of the Hugging Face hub, from a hub on this machine.

use std::collections::BTreeMap;
use std::process::Output;

use serde_json::{Value, json};

use crate::support::hub::{Hub, Model};
use crate::support::{Scene, text};

const MODEL: &str = "model.safetensors";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Runs the binary with that hub, and a cache in the scene.
fn cohort(scene: &Scene, hub: &str, line: &str, environment: &[(&str, &str)]) -> Output {
    let mut command = scene.cohort(line);
    for name in [
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", hub)
        .env("HF_HOME", scene.path("hf"))
        .envs(environment.iter().copied());
    command.output().expect("the binary runs")
}

fn succeeds(scene: &Scene, hub: &str, line: &str, environment: &[(&str, &str)]) -> Output {
    let output = cohort(scene, hub, line, environment);
    assert!(
        output.status.success(),
        "`cohort {line}`: {}",
        text(&output.stderr)
    );
    output
}

fn fails(scene: &Scene, hub: &str, line: &str) -> String {
    let output = cohort(scene, hub, line, &[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "`cohort {line}`: {said}");
    said
}

/// A model that was trained here, exported to `out`.
fn exported(scene: &Scene) -> Model {
    scene.finished("pretrain spec.toml --corpus text.txt --local 1 --name base --set model.qk_norm=true --set model.head_dim=12");
    scene.run("export base out");
    Model::of(&scene.path("out"))
}

/// The same model in two files and an index.
fn sharded(model: &Model) -> Model {
    let mut files = model.files.clone();
    let whole = files.remove(MODEL).expect("the weights");
    let length = u64::from_le_bytes(whole[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = whole[8..].split_at(length);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).expect("a header");
    let mut shards = [(json!({}), Vec::new()), (json!({}), Vec::new())];
    let mut map = json!({});
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    for (index, (name, tensor)) in tensors.enumerate() {
        let at = |i: usize| tensor["data_offsets"][i].as_u64().expect("an offset") as usize;
        let (header, bytes) = &mut shards[index % 2];
        let begin = bytes.len();
        bytes.extend_from_slice(&data[at(0)..at(1)]);
        header[name] = tensor.clone();
        header[name]["data_offsets"] = json!([begin, bytes.len()]);
        map[name] = json!([FIRST, SECOND][index % 2]);
    }
    for (name, (header, bytes)) in [FIRST, SECOND].into_iter().zip(shards) {
        let header = header.to_string().into_bytes();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(bytes);
        files.insert(name.into(), file);
    }
    files.insert(
        INDEX.into(),
        json!({ "weight_map": map }).to_string().into_bytes(),
    );
    Model { files, token: None }
}

#[test]
fn a_model_of_the_hub_is_the_model_that_was_put_there() {
    let scene = Scene::new();
    let mut model = exported(&scene);
    for extra in ["README.md", "pytorch_model.bin", "consolidated.safetensors"] {
        model.files.insert(extra.into(), b"not wanted".to_vec());
    }
    let hub = Hub::serve([("someone/shards", sharded(&model)), ("someone/tiny", model)]);
    let generate = "--prompt the --temperature 0 --max-tokens 20";
    let expected = scene
        .run(&format!("generate --from ./out {generate}"))
        .stdout;
    for name in ["hf://someone/tiny", "hf://someone/shards@v1"] {
        let line = format!("generate --from {name} {generate}");
        assert_eq!(
            text(&succeeds(&scene, &hub.url, &line, &[]).stdout),
            text(&expected)
        );
        let asked = hub.asked();
        let unwanted = ["README.md", "pytorch_model.bin", "consolidated.safetensors"];
        assert!(
            !asked
                .iter()
                .any(|path| unwanted.iter().any(|file| path.ends_with(file))),
            "{asked:?}"
        );
        // What is in the cache is not downloaded again.
        succeeds(&scene, &hub.url, &line, &[]);
        let asked = hub.asked();
        assert!(
            asked.len() == 1 && asked[0].starts_with("/api/"),
            "{asked:?}"
        );
    }

    let score = |from: &str| {
        let line = format!("eval --from {from} --text text.txt --json");
        let output = succeeds(&scene, &hub.url, &line, &[]);
        let score: Value = serde_json::from_slice(&output.stdout).expect("one event");
        score["loss"].clone()
    };
    assert_eq!(score("hf://someone/shards"), score("./out"));

    succeeds(&scene, &hub.url, "export hf://someone/tiny again", &[]);
    let read = |name: &str| std::fs::read(scene.path(name).join(MODEL)).expect("the weights");
    assert!(read("again") == read("out"));

    for name in ["hf://someone/tiny", "hf://someone/shards"] {
        let tune = format!(
            "finetune --from {name} --corpus text.txt --set train.steps=2 --set train.lanes=2 --local 1 --json --new"
        );
        let output = succeeds(&scene, &hub.url, &tune, &[]);
        let said = text(&output.stderr);
        assert!(
            said.contains(&format!("model.qk_norm = true (inherited from {name})")),
            "{said}"
        );
        let stdout = text(&output.stdout);
        let events = stdout
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let ended = events.filter(|event| event["event"] == "finished");
        assert_eq!(
            ended.map(|e| e["step"].clone()).collect::<Vec<_>>(),
            [json!(2)]
        );
    }
}

#[test]
fn without_the_hub_the_cache_answers() {
    let scene = Scene::new();
    let hub = Hub::serve([("someone/tiny", exported(&scene))]);
    let line = "generate --from hf://someone/tiny --prompt the --max-tokens 5";
    let expected = succeeds(&scene, &hub.url, line, &[]).stdout;
    // Nobody listens on port 1.
    let nobody = "http://127.0.0.1:1";
    let output = succeeds(&scene, nobody, line, &[]);
    assert_eq!(output.stdout, expected);
    let said = text(&output.stderr);
    assert!(
        said.contains("`hf://someone/tiny` is taken from the cache"),
        "{said}"
    );
    hub.asked();
    let offline = [("HF_HUB_OFFLINE", "1")];
    assert_eq!(succeeds(&scene, &hub.url, line, &offline).stdout, expected);
    assert_eq!(hub.asked(), Vec::<String>::new());

    let said = fails(
        &scene,
        nobody,
        "generate --from hf://someone/other --prompt the",
    );
    assert!(
        said.contains("error: cannot reach the hub at http://127.0.0.1:1 for `hf://someone/other`")
            && said.contains("hint: check the network and HF_ENDPOINT"),
        "{said}"
    );
    let other = "generate --from hf://someone/other --prompt the";
    let said = text(&cohort(&scene, &hub.url, other, &offline).stderr);
    assert!(
        said.contains("`hf://someone/other` is not in the cache")
            && said.contains("HF_HUB_OFFLINE"),
        "{said}"
    );
}

#[test]
fn what_the_hub_does_not_give_is_named() {
    let scene = Scene::new();
    let tiny = exported(&scene);
    let without = |names: &[&str]| {
        let mut model = tiny.clone();
        model
            .files
            .retain(|name, _| !names.contains(&name.as_str()));
        model
    };
    let mut strange = tiny.clone();
    let config = tiny.files["config.json"].clone();
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["use_sliding_window"] = json!(true);
    strange
        .files
        .insert("config.json".into(), config.to_string().into_bytes());
    let mut holes = sharded(&tiny);
    holes.files.remove(SECOND);
    let gated = Model {
        token: Some("hf_secret".into()),
        ..tiny.clone()
    };
    let hub = Hub::serve([
        ("someone/gated", gated),
        ("someone/old", without(&[MODEL])),
        ("someone/words", without(&["config.json"])),
        ("someone/strange", strange),
        ("someone/holes", holes),
        ("someone/tiny", tiny.clone()),
    ]);
    let said = |name: &str| {
        fails(
            &scene,
            &hub.url,
            &format!("generate --from {name} --prompt the"),
        )
    };
    for (name, parts) in [
        (
            "hf://someone/nothing",
            [
                "has no `hf://someone/nothing`",
                "hint: check owner, name and revision",
            ],
        ),
        (
            "hf://someone/tiny@v9",
            ["has no `hf://someone/tiny@v9`", "hint: check owner"],
        ),
        (
            "hf://someone/gated",
            ["it is private or gated", "set HF_TOKEN to a token"],
        ),
        (
            "hf://someone/old",
            [
                "`hf://someone/old` has no `model.safetensors`",
                "only safetensors are read",
            ],
        ),
        (
            "hf://someone/words",
            ["`hf://someone/words` has no `config.json`", "hint: "],
        ),
        ("hf://someone/holes", [SECOND, "which its index names"]),
        (
            "hf://tiny",
            [
                "`hf://tiny` names no model of the hub",
                "write `hf://OWNER/NAME`",
            ],
        ),
    ] {
        let said = said(name);
        assert!(
            parts.iter().all(|part| said.contains(part)),
            "{name}: {said}"
        );
    }
    hub.asked();
    let refused = said("hf://someone/strange");
    assert!(
        refused.contains("cannot use `hf://someone/strange`")
            && refused.contains("field `use_sliding_window` is `true`"),
        "{refused}"
    );
    let asked = hub.asked();
    assert!(
        !asked.iter().any(|path| path.contains("safetensors")),
        "{asked:?}"
    );

    let line = "generate --from hf://someone/gated --prompt the --max-tokens 5";
    succeeds(&scene, &hub.url, line, &[("HF_TOKEN", "hf_secret")]);
}
