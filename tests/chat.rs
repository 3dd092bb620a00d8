//! Conversations in a pipe, and the chat template on its way from directory to checkpoint to directory.

use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::support::{Scene, text};

const TRAIN: &str = "pretrain spec.toml --corpus text.txt --set model.context=96 --local 1";

/// A template that is nothing like ours.
const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}[assistant] {% endif %}";

/// Runs `cohort chat` with these lines on stdin.
fn chat(scene: &Scene, flags: &str, lines: &str) -> Output {
    let mut child = scene
        .cohort(&format!("chat {flags}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut stdin = child.stdin.take().expect("piped");
    // A chat that fails early leaves the rest unread.
    let _ = stdin.write_all(lines.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

/// The same; it must succeed. Gives stdout and stderr.
fn chats(scene: &Scene, flags: &str, lines: &str) -> (String, String) {
    let output = chat(scene, flags, lines);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    (text(&output.stdout), said)
}

fn tokenizer_config(checkpoint: &Path) -> Value {
    let config = std::fs::read_to_string(checkpoint.join("tokenizer_config.json"));
    serde_json::from_str(&config.expect("it is there")).expect("it is JSON")
}

#[test]
fn a_conversation_in_a_pipe() {
    let scene = Scene::new();
    scene.finished(&format!("{TRAIN} --name talker"));
    let few = "--from talker --max-tokens 6 --threads 1";

    // Each line has its answer; the same seed and lines give the same ones.
    let (answers, said) = chats(&scene, few, "the tree\n\nthe root\n");
    assert!(said.contains("talker@12 has no chat template"), "{said}");
    assert!(!answers.is_empty());
    assert!(
        !answers.contains("User:") || !said.contains("> "),
        "{answers}"
    );
    assert_eq!(chats(&scene, few, "the tree\nthe root").0, answers);
    let (first, _) = chats(&scene, few, "the tree\n/exit\nthe root\n");
    assert!(answers.starts_with(&first) && answers.len() > first.len());

    // After a reset the first line is the first again; only the seed has moved on, which does not matter here.
    let likeliest = format!("{few} --temperature 0");
    let (once, _) = chats(&scene, &likeliest, "the tree\n");
    let (twice, said) = chats(&scene, &likeliest, "the tree\n/reset\nthe tree\n");
    assert_eq!(twice, format!("{once}{once}"));
    assert!(said.contains("(a new conversation)"), "{said}");
    let told = format!("{likeliest} --system lanes");
    let (told, said) = chats(&scene, &told, &"the tree and the root\n".repeat(6));
    assert!(!told.is_empty());
    assert!(
        said.contains("longer than the context of 96 tokens: its oldest 2 turns are forgotten"),
        "{said}"
    );

    let long = chat(&scene, few, &"the tree and the root ".repeat(30));
    let said = text(&long.stderr);
    assert_eq!(long.status.code(), Some(1), "{said}");
    assert!(said.contains("of the model's context of 96"), "{said}");
    assert_eq!(text(&long.stdout), "");
}

#[test]
fn a_chat_template_stays_with_the_model() {
    let scene = Scene::new();
    scene.finished(&format!("{TRAIN} --name base"));
    scene.run("export base ./model");
    let model = scene.path("model");
    let mut config = tokenizer_config(&model);
    assert_eq!(config.get("chat_template"), None);
    config["chat_template"] = TEMPLATE.into();
    scene.write("model/tokenizer_config.json", &config.to_string());

    let few = "--max-tokens 4 --threads 1";
    let (_, said) = chats(&scene, &format!("--from ./model {few}"), "the tree\n");
    assert!(!said.contains("has no chat template"), "{said}");

    // From a directory to a run, from there to the next run, and out again.
    scene.write("more.txt", &crate::support::words(2, 6_000));
    let tune = "finetune --corpus more.txt --local 1 --set train.steps=4";
    let tuned = scene.finished(&format!("{tune} --from ./model --name tuned"));
    let path = tuned["checkpoint"].as_str().expect("a path");
    assert_eq!(tokenizer_config(Path::new(path))["chat_template"], TEMPLATE);
    scene.finished(&format!("{tune} --from tuned --name again"));
    scene.run("export again ./exported");
    let exported = scene.path("exported");
    assert_eq!(tokenizer_config(&exported)["chat_template"], TEMPLATE);
    let (_, said) = chats(&scene, &format!("--from again {few}"), "the tree\n");
    assert!(!said.contains("has no chat template"), "{said}");

    scene.write("model/chat_template.jinja", "{% for");
    let broken = chat(&scene, &format!("--from ./model {few}"), "the tree\n");
    let said = text(&broken.stderr);
    assert_eq!(broken.status.code(), Some(1), "{said}");
    assert!(said.contains("the chat template does not parse"), "{said}");
}
