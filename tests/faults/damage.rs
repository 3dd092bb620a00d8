//! Disks that are full, and bytes on them that are not what was written. Each must be noticed and named; once it is put
//! right, the same command goes on to the same bits.

use std::path::PathBuf;
use std::time::Instant;

use super::{Bench, Measured, Span, TRAIN, WARM, WORKERS, failure};
use crate::support::cluster::{self, Cluster, RUN, can_verify, files, flip};

/// A limit on the size of files stands in for a full disk.
pub fn disk_full(bench: &Bench) -> Measured {
    let scene = bench.scene();
    let mut cluster = Cluster::start(&scene, 0);
    cluster.end_coordinator();
    cluster.restart_coordinator_limited(&format!("trap '' XFSZ; ulimit -f {}", bench.limit));
    for _ in 0..WORKERS {
        cluster.add_worker();
    }
    cluster.submit(&format!("{TRAIN} --new"));
    let said = failure(&cluster.rest());
    assert!(said.contains("make room on the disk"), "{said}");
    cluster.kill_coordinator();
    cluster.restart_coordinator();
    cluster.submit(TRAIN);
    cluster.finish();
    repaired(bench, &cluster, &said)
}

/// The figures of a run that failed, was put right, and went on.
fn repaired(bench: &Bench, cluster: &Cluster<'_>, said: &str) -> Measured {
    let measured = bench.measure(cluster, Span::at(Instant::now()));
    let said = said.replace(&cluster.scene.path("").display().to_string(), "");
    Measured {
        delay_ms: None,
        ..measured
    }
    .noted(format!("the run stops and says: {said}"))
}

/// The largest file of this kind: the training text, not the validation's.
fn largest(directory: PathBuf, extension: &str) -> PathBuf {
    let mut found = files(&directory);
    found.retain(|path| path.extension().is_some_and(|e| e == extension));
    let bytes = |path: &PathBuf| path.metadata().map_or(0, |m| m.len());
    found.into_iter().max_by_key(bytes).expect("there is one")
}

pub fn shard(bench: &Bench) -> Measured {
    let scene = bench.scene();
    let mut cluster = Cluster::start(&scene, WORKERS);
    let url = cluster.url();
    scene.run(&format!(
        "corpus prepare text.txt --spec spec.toml --coordinator {url}"
    ));
    let shard = largest(scene.path("home/corpora"), "shard");
    let middle = shard.metadata().expect("it is there").len() as usize / 2;
    flip(&shard, middle);
    cluster.submit(&format!("{TRAIN} --new"));
    let said = failure(&cluster.rest());
    assert!(
        said.contains("damaged") && said.contains("/shards/"),
        "{said}"
    );
    flip(&shard, middle);
    cluster.submit(TRAIN);
    cluster.finish();
    repaired(bench, &cluster, &said)
}

pub fn cached_shard(bench: &Bench) -> Measured {
    let scene = bench.scene();
    let mut cluster = Cluster::start(&scene, 1);
    // Another run fills the cache.
    let url = cluster.url();
    scene.run(&format!(
        "{TRAIN} --set train.steps=6 --name other --coordinator {url}"
    ));
    cluster.workers[0].kill();
    let shard = largest(scene.path("cache-0"), "shard");
    flip(
        &shard,
        shard.metadata().expect("it is there").len() as usize / 2,
    );
    // A worker on the damaged cache.
    let line = format!("worker --coordinator {url} --threads 1 --home cache-0");
    let mut worker = scene.start(&line);
    worker.wait_for("joined");
    cluster.submit(&format!("{TRAIN} --new"));
    let last = cluster.rest();
    let said = match last["event"] == "finished" {
        // It is fetched anew, with a word in the log.
        true => worker.tail(usize::MAX),
        false => failure(&last),
    };
    let name = shard.file_name().expect("a file").to_string_lossy();
    assert!(
        said.contains("damaged") && said.contains(&*name),
        "nobody names `{name}`; the run: {last}; the undisturbed state: {}",
        bench.reference().state_hash
    );
    if last["event"] != "finished" {
        std::fs::remove_file(&shard).expect("it can be removed");
        cluster.submit(TRAIN);
        cluster.finish();
    }
    let line = said.lines().find(|line| line.contains("damaged"));
    repaired(bench, &cluster, line.expect("just seen"))
}

pub fn checkpoint(bench: &Bench) -> Measured {
    let scene = bench.scene();
    let mut cluster = Cluster::start(&scene, WORKERS);
    cluster.submit(&format!("{TRAIN} --new"));
    cluster.wait_for_step(WARM);
    cluster.wait_until("a checkpoint", |c| {
        c.events.iter().any(|e| e.is("checkpoint"))
    });
    cluster.kill_coordinator();
    for worker in &mut cluster.workers {
        worker.kill();
    }
    let mut weights = files(&scene.path(&format!("home/runs/{RUN}/checkpoints")));
    weights.retain(|path| {
        path.ends_with("model.safetensors") && !path.to_string_lossy().contains(".unfinished-")
    });
    let newest = weights.into_iter().max().expect("there is a checkpoint");
    let middle = newest.metadata().expect("it is there").len() as usize / 2;
    flip(&newest, middle);
    cluster.restart_coordinator();
    let line = format!(
        "{TRAIN} --name {RUN} --coordinator {} --detach",
        cluster.url()
    );
    let said = scene.fails(&line);
    assert!(
        said.contains("damaged") && said.contains("model.safetensors"),
        "{said}"
    );
    flip(&newest, middle);
    for _ in 0..2 {
        cluster.add_worker();
    }
    cluster.submit(TRAIN);
    cluster.finish();
    repaired(bench, &cluster, said.lines().next().expect("a line"))
}

/// The norm of a step's gradient, as it stands in the ledger's entry, is changed in its last place.
pub fn database(bench: &Bench) -> Measured {
    let scene = bench.scene();
    let mut cluster = Cluster::start(&scene, WORKERS);
    cluster.submit(&format!("{TRAIN} --new"));
    cluster.finish();
    let measured = bench.measure(&cluster, Span::at(Instant::now()));
    cluster.end_coordinator();
    let database = scene.path("home/cohort.db");
    // Everything in one file: what was written last may lie in the log beside it.
    let connection = rusqlite::Connection::open(&database).expect("it is a database");
    let moved: Result<(), _> =
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    moved.expect("nobody else has it open");
    drop(connection);
    let bytes = std::fs::read(&database).expect("the database is there");
    let norm = bench.reference().steps[20]["grad_norm"]
        .as_f64()
        .expect("a norm");
    // Pages that were split leave copies behind.
    let places = bytes.windows(8).enumerate();
    let places: Vec<usize> = places
        .filter(|(_, eight)| *eight == norm.to_le_bytes())
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty(), "the entry of step 21 is there");
    for place in places {
        flip(&database, place);
    }
    let said = match can_verify() {
        true => cluster::verify(&scene).expect_err("a bit is flipped"),
        false => "damaged: not asked, as this binary cannot audit".into(),
    };
    assert!(said.contains("damaged"), "{said}");
    Measured {
        delay_ms: None,
        ..measured
    }
    .noted(format!("`cohort verify` says: {said}"))
}
