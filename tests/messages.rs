//! What a user reads when something is wrong, word for word: exit code, stdout and stderr of commands that fail before
//! anything is trained. Paths of the temporary directory become `[DIR]`, ports that the system has chosen `[PORT]`.

use std::net::TcpListener;

use insta::assert_snapshot;

use crate::support::{Scene, text};

/// Runs `cohort` and gives what a user sees.
fn says(scene: &Scene, line: &str) -> String {
    let output = scene.cohort(line).output().expect("the binary runs");
    let code = output.status.code();
    let mut shown = format!(
        "exit code {}",
        code.map_or("none".into(), |code| code.to_string())
    );
    for (stream, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        let printed = text(bytes);
        if !printed.is_empty() {
            shown += &format!("\n--- {stream}\n{}", printed.trim_end());
        }
    }
    shown.replace(&scene.path("").display().to_string(), "[DIR]/")
}

/// The same, with a port shown as `[PORT]`.
fn says_with_port(scene: &Scene, line: &str, port: u16) -> String {
    says(scene, line).replace(&port.to_string(), "[PORT]")
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

#[test]
fn a_spec_with_an_unknown_key() {
    let scene = Scene::new();
    scene.write("spec.toml", "[train]\nstpes = 10\n");
    assert_snapshot!(says(&scene, "pretrain spec.toml --corpus text.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: unknown key `train.stpes` in table [train] (spec.toml, line 2); [train] takes steps, lanes, micro_batch, accumulate, learning_rate, min_learning_rate, warmup_steps, schedule, decay_steps, beta1, beta2, eps, weight_decay, grad_clip, precision, payload, sync, inner_steps, outer_learning_rate, outer_momentum, gradient_checkpointing, seed, eval_every, eval_samples, freeze_layers, layer_decay, unfreeze_every, data_share, replay, early_stopping_patience, max_forgetting, max_length, min_workers
    ");
    assert_snapshot!(says(&scene, "pretrain --corpus text.txt --local 1 --set train.lanse=3"), @r"
    exit code 1
    --- stderr
    error: unknown key `train.lanse` in table [train] (--set train.lanse=3); [train] takes steps, lanes, micro_batch, accumulate, learning_rate, min_learning_rate, warmup_steps, schedule, decay_steps, beta1, beta2, eps, weight_decay, grad_clip, precision, payload, sync, inner_steps, outer_learning_rate, outer_momentum, gradient_checkpointing, seed, eval_every, eval_samples, freeze_layers, layer_decay, unfreeze_every, data_share, replay, early_stopping_patience, max_forgetting, max_length, min_workers
    ");
}

#[test]
fn a_spec_with_an_impossible_value() {
    let scene = Scene::new();
    let shape = "[model]\nhidden_size = 100\nnum_attention_heads = 3\n";
    scene.write("spec.toml", shape);
    assert_snapshot!(says(&scene, "pretrain spec.toml --corpus text.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: `model.hidden_size` is 100, but it must be a multiple of `model.num_attention_heads`, which is 3; 99 or 102 would do
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus text.txt --set train.lanes=0 --local 1"), @r"
    exit code 1
    --- stderr
    error: `train.lanes` is 0, but it must lie between 1 and 16384; 8 is the default, and any number of workers shares them
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --local 1"), @r"
    exit code 1
    --- stderr
    error: `corpus.paths` is missing: there is no text to train on; pass `--corpus PATH` or set it in the spec
    ");
}

#[test]
fn a_spec_that_is_not_there() {
    assert_snapshot!(says(&Scene::new(), "pretrain nowhere.toml --local 1"), @r"
    exit code 1
    --- stderr
    error: cannot read the spec `nowhere.toml`

    Caused by:
      No such file or directory (os error 2)
    ");
}

#[test]
fn an_unknown_preset() {
    assert_snapshot!(says(&Scene::new(), "pretrain --preset tini --local 1"), @r"
    exit code 1
    --- stderr
    error: there is no preset `tini`; did you mean `tiny`?
    ");
    assert_snapshot!(says(&Scene::new(), "presets huge"), @r"
    exit code 1
    --- stderr
    error: there is no preset `huge`; there are tiny, shakespeare-quick, nanogpt-shakespeare-cpu, shakespeare-cpu, small, gpt2
    ");
}

#[test]
fn corpus_files_that_cannot_be_used() {
    let scene = Scene::new();
    scene.write("empty.txt", "");
    scene.write("binary.txt", "some text\0more");
    std::fs::write(scene.path("latin.txt"), b"caf\xe9 au lait").expect("a file is written");
    let lines = "{\"text\": \"fine\"}\n{\"content\": \"other\"}\n";
    scene.write("broken.jsonl", lines);
    std::fs::create_dir(scene.path("pictures")).expect("a directory is made");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus missing.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: `missing.txt` names no file; check the spelling
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus empty.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: `empty.txt` is empty; repair it, or leave such input out with `--skip-bad`
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus binary.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: `binary.txt` is binary: it has a NUL byte at byte 9; repair it, or leave such input out with `--skip-bad`
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus latin.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: `latin.txt` is not UTF-8: byte 3 begins no valid character; repair it, or leave such input out with `--skip-bad`
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus broken.jsonl --local 1"), @r"
    exit code 1
    --- stderr
    error: `broken.jsonl` line 2 has no text field `text`; its fields are `content`; repair it, or leave such input out with `--skip-bad`
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus pictures --local 1"), @r"
    exit code 1
    --- stderr
    error: directory `pictures` holds no text files (taken are: txt, text, md, markdown, rst, tex, org, adoc, jsonl, csv, tsv, parquet, arrow, warc, wet, rs, py, c, h, cc, cpp, cxx, hpp, cu, cuh, go, java, kt, scala, swift, js, mjs, jsx, ts, tsx, rb, php, pl, lua, jl, r, hs, ml, ex, erl, clj, lisp, zig, cs, fs, sh, bash, sql, html, css, toml, yaml, yml, proto, each also .gz, .zst, .bz2 or .xz); name the files one by one
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus *.rs --local 1"), @r"
    exit code 1
    --- stderr
    error: `*.rs` names no file; check the spelling
    ");
    assert!(!scene.path("home").exists(), "nothing was started");
}

#[test]
fn no_coordinator() {
    let (scene, port) = (Scene::new(), free_port());
    let line = format!("cancel tiny-1 --coordinator http://127.0.0.1:{port}");
    assert_snapshot!(says_with_port(&scene, &line, port), @r"
    exit code 1
    --- stderr
    error: no coordinator answers at http://127.0.0.1:[PORT]: Connection refused (os error 111); start one with `cohort coordinator`, or name another with `--coordinator`
    ");
    assert_snapshot!(says(&scene, "cancel tiny-1 --coordinator http://"), @r"
    exit code 1
    --- stderr
    error: `http://` is not an address of a coordinator; expected something like `https://host:7070`, or `http://` where it is not encrypted
    ");
    assert_snapshot!(says(&scene, "cancel tiny-1 --coordinator ftp://host"), @r"
    exit code 1
    --- stderr
    error: `ftp://host` is not an address of a coordinator; expected something like `https://host:7070`, or `http://` where it is not encrypted
    ");
}

#[test]
fn a_port_in_use() {
    let scene = Scene::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let line = format!("coordinator --listen 127.0.0.1:{port}");
    assert_snapshot!(says_with_port(&scene, &line, port), @r"
    exit code 1
    --- stderr
    error: cannot listen on 127.0.0.1:[PORT]: the port is in use, perhaps by another coordinator

    hint: end that process, choose another port with `--listen`, or let the system choose with `--listen 127.0.0.1:0`
    ");
    assert_snapshot!(says(&scene, "coordinator --listen nonsense"), @r"
    exit code 1
    --- stderr
    error: `nonsense` is no address to listen on; expected something like `127.0.0.1:7070`

    Caused by:
      invalid socket address
    ");
}

#[test]
fn listening_for_others_without_a_token() {
    let scene = Scene::new();
    assert_snapshot!(says(&scene, "coordinator --listen 0.0.0.0:0"), @r"
    exit code 1
    --- stderr
    error: refusing to listen on 0.0.0.0:0 without a token: everybody who reaches this machine could train here and read or delete what is there

    hint: make a cluster with `cohort init`; its coordinator listens anywhere, encrypted
    ");
    scene.write("shared", "0123456789abcdef");
    assert_snapshot!(says(&scene, "coordinator --listen 0.0.0.0:0 --token-file shared"), @r"
    exit code 1
    --- stderr
    error: refusing to listen on 0.0.0.0:0 without TLS: everybody on the way could read the token, the text and the weights, and change them

    hint: make a cluster with `cohort init`, and leave the token out; or, on a network that you trust, add `--insecure plaintext`
    ");
    scene.write("token", "short");
    assert_snapshot!(says(&scene, "coordinator --listen 0.0.0.0:0 --token-file token"), @r"
    exit code 1
    --- stderr
    error: `token`: the token has 5 characters; use at least 16, for example from `openssl rand -hex 32`
    ");
    assert_snapshot!(says(&scene, "coordinator --listen 0.0.0.0:0 --token-file absent"), @r"
    exit code 1
    --- stderr
    error: cannot read the token from `absent`

    Caused by:
      No such file or directory (os error 2)
    ");
}

#[test]
fn a_home_that_cannot_be_written() {
    let scene = Scene::new();
    // A file in the place of a directory cannot be written by anybody, not even by root.
    scene.write("home", "a file");
    assert_snapshot!(says(&scene, "coordinator --listen 127.0.0.1:0"), @r"
    exit code 1
    --- stderr
    error: cannot write to the home directory: `[DIR]/home/corpora`; choose another with `--home` or `COHORT_HOME`

    Caused by:
      Not a directory (os error 20)
    ");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus text.txt --local 1"), @r"
    exit code 1
    --- stderr
    error: cannot write to the home directory: `[DIR]/home/corpora`; choose another with `--home` or `COHORT_HOME`

    Caused by:
      Not a directory (os error 20)
    ");
}

#[test]
fn an_unknown_run() {
    let scene = Scene::new();
    assert_snapshot!(says(&scene, "status tiny-1"), @r"
    exit code 1
    --- stderr
    error: there is no home directory `[DIR]/home`; nothing was trained there yet, or `--home` names another
    ");
    assert_snapshot!(says(&scene, "generate --from tiny-1@best --prompt x"), @r"
    exit code 1
    --- stderr
    error: there is no home directory `[DIR]/home`; nothing was trained there yet, or `--home` names another
    ");
    assert_snapshot!(says(&scene, "generate --from tiny-1@worst --prompt x"), @r"
    exit code 1
    --- stderr
    error: `tiny-1@worst` names no checkpoint: after `@` comes a step, `best` or `last`
    ");
    assert_snapshot!(says(&scene, "generate --from ./nowhere --prompt x"), @r"
    exit code 1
    --- stderr
    error: no checkpoint at `./nowhere`: there is no such directory
    ");
}

#[test]
fn names_that_a_coordinator_does_not_know() {
    let scene = Scene::new();
    let (coordinator, url) = scene.coordinator("");
    let port: u16 = url
        .rsplit(':')
        .next()
        .and_then(|p| p.parse().ok())
        .expect("a port");
    assert_snapshot!(says(&scene, "status tiny-1"), @r"
    exit code 1
    --- stderr
    error: there is no run `tiny-1`; `cohort runs` lists them
    ");
    assert_snapshot!(says(&scene, "follow tiny-1"), @r"
    exit code 1
    --- stderr
    error: there is no run `tiny-1`; `cohort runs` lists them
    ");
    assert_snapshot!(says(&scene, "rm tiny-1"), @r"
    exit code 1
    --- stderr
    error: there is no run `tiny-1`; `cohort runs` lists them
    ");
    assert_snapshot!(says(&scene, "pretrain --resume tiny-1"), @r"
    exit code 1
    --- stderr
    error: there is no run `tiny-1`; `cohort runs` lists them
    ");
    assert_snapshot!(says(&scene, "finetune --from tiny-1@best --corpus text.txt"), @r"
    exit code 1
    --- stderr
    error: there is no run `tiny-1`; `cohort runs` lists them
    ");
    assert_snapshot!(says(&scene, "export tiny-1@100 out"), @r"
    exit code 1
    --- stderr
    error: there is no run `tiny-1`; `cohort runs` lists them
    ");
    assert_snapshot!(says(&scene, "corpus show tales"), @r"
    exit code 1
    --- stderr
    error: no corpus `tales` is here; `cohort corpus ls` lists those that are
    ");
    let pid = coordinator.child.id().to_string();
    let taken = says_with_port(
        &scene,
        "pretrain --preset tiny --corpus text.txt --local 1",
        port,
    );
    assert_snapshot!(taken.replace(&pid, "[PID]"), @r"
    exit code 1
    --- stderr
    error: the home directory `[DIR]/home` is in use by the coordinator with process id [PID] at http://127.0.0.1:[PORT]

    hint: leave `--local` out to use that cluster, or choose another directory with `--home`
    ");
}

#[test]
fn a_coordinator_that_wants_a_token() {
    let scene = Scene::new();
    scene.write("token", "0123456789abcdef0123");
    let _coordinator = scene.coordinator("--token-file token");
    assert_snapshot!(says(&scene, "runs"), @r"
    exit code 1
    --- stderr
    error: the coordinator wants a token that this call does not carry; give --token-file or COHORT_TOKEN
    ");
    assert_snapshot!(says(&scene, "runs --token-file token"), @r"
    exit code 0
    --- stdout
    no runs yet; `cohort pretrain` makes one
    ");
}

#[test]
fn a_corpus_that_is_too_short() {
    let scene = Scene::new();
    let _coordinator = scene.coordinator("");
    scene.write("short.txt", "Not much.");
    assert_snapshot!(says(&scene, "pretrain --preset tiny --corpus short.txt"), @r"
    exit code 1
    --- stdout
    corpus      short (f2c0df0e629e), prepared
      training    1 documents, 8 bytes, 9 tokens in 1 shards
      validation  1 documents, 1 bytes, 2 tokens in 1 shards
      tokenizer   257 tokens
      baselines   uniform 5.5491, unigram 2.7419 (7.9116 bits per byte)
    --- stderr
    error: the train split has 9 tokens, but one sample of context 64 takes 65; give more text or a shorter context
    ");
}

#[test]
fn a_device_that_this_build_does_not_have() {
    assert_snapshot!(says(&Scene::new(), "generate --from ./nowhere --prompt x --device tpu"), @r"
    exit code 1
    --- stderr
    error: unknown device `tpu`; use `auto`, `cpu` or `cuda:N`
    ");
}

#[test]
fn usage_errors_have_the_exit_code_2() {
    let shown = says(&Scene::new(), "pretrain --local 0");
    assert!(
        shown.starts_with("exit code 2\n--- stderr\nerror: "),
        "{shown}"
    );
    let shown = says(
        &Scene::new(),
        "pretrain --local 2 --coordinator http://127.0.0.1:1",
    );
    assert!(
        shown.starts_with("exit code 2\n--- stderr\nerror: "),
        "{shown}"
    );
}
