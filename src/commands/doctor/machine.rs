//! A machine: processor, cores, memory, open files, shared memory, GPUs. What is known of one, and what that means; how it
//! is found out is in `probe.rs`.

use cohort_common::spec::{human_bytes, human_count};
use cohort_worker::engine::ops::simd::InstructionSet;

use super::cgroup::Limits;
use super::finding::Finding;

/// Memory below which no model worth training fits.
const LITTLE_MEMORY: u64 = 1 << 30;
/// Bytes that a worker takes for each parameter, roughly: parameter, moments, and gradients in several places.
const BYTES_PER_PARAMETER: u64 = 32;
/// Files below which a coordinator is soon full.
const FEW_FILES: usize = 1024;

/// What is known of a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// The processor's name.
    pub processor: String,
    /// What kernels are compiled for that it has.
    pub instructions: InstructionSet,
    /// Whether it multiplies tiles of bf16.
    pub amx: bool,
    /// Cores that it has, as the system counts them.
    pub cores: usize,
    /// Cores that this process may use.
    pub usable: usize,
    /// What the control group leaves.
    pub limits: Limits,
    /// Bytes of memory, and those that are free or can be freed, if that is known.
    pub memory: Option<(u64, u64)>,
    /// Files that a process may have open at most.
    pub files: usize,
    /// Whether memory can be shared between processes, or why not.
    pub shared_memory: Result<(), String>,
    /// GPUs.
    pub gpus: Gpus,
}

/// What is known of GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gpus {
    /// The version of NVIDIA's driver, if it is loaded.
    pub driver: Option<String>,
    /// The cards' names.
    pub cards: Vec<String>,
    /// Whether this build has CUDA.
    pub build: bool,
}

/// What to say of a machine.
pub fn findings(machine: &Machine) -> Vec<Finding> {
    vec![
        processor(machine),
        cores(machine),
        memory(machine),
        files(machine),
        shared_memory(machine),
        gpus(&machine.gpus),
    ]
}

fn processor(machine: &Machine) -> Finding {
    let name = &machine.processor;
    let bf16 = match machine.amx {
        true => "AMX for bf16",
        false => "no AMX, so bf16 (`train.precision`) saves no time here",
    };
    match machine.instructions {
        InstructionSet::Avx512 => Finding::ok("processor", format!("{name}: AVX-512, {bf16}")),
        InstructionSet::Avx2 => Finding::ok("processor", format!("{name}: AVX2, {bf16}")),
        InstructionSet::Baseline => Finding::note(
            "processor",
            format!(
                "{name}: no AVX2 with FMA, so training is several times slower, and to other bits than with it"
            ),
            "use machines with AVX2, or only machines without: the workers of a run must compute the same bits",
        ),
    }
}

fn cores(machine: &Machine) -> Finding {
    let (cores, usable) = (machine.cores, machine.usable);
    let text = match cores == usable {
        true => format!("{cores}, all usable"),
        false => format!("{usable} usable of {cores}"),
    };
    match machine.limits.cores {
        // A worker's threads wait for each other: one that is stopped holds up all.
        Some(quota) if quota < usable as f64 || quota.fract() > 0.01 => Finding::note(
            "cores",
            format!("{text}, but the control group leaves the time of {quota:.1}"),
            format!(
                "limit it to whole cores, or start workers with `--threads {}`: threads that share a core hold each other up",
                (quota as usize).max(1)
            ),
        ),
        _ => Finding::ok("cores", text),
    }
}

fn memory(machine: &Machine) -> Finding {
    let Some((total, available)) = machine.memory else {
        return Finding::ok("memory", "not known on this platform");
    };
    let mut text = format!(
        "{} of {} available",
        human_bytes(available),
        human_bytes(total)
    );
    let mut usable = available;
    if let Some(limit) = machine.limits.memory.filter(|&limit| limit < total) {
        text += &format!(", the control group leaves {}", human_bytes(limit));
        usable = usable.min(limit);
    }
    let parameters = human_count(usable / BYTES_PER_PARAMETER);
    text += &format!(": room for the state of about {parameters} parameters");
    match usable < LITTLE_MEMORY {
        true => Finding::note(
            "memory",
            text,
            "`cohort plan` says what a run needs; end other programs, or raise the limit",
        ),
        false => Finding::ok("memory", text),
    }
}

fn files(machine: &Machine) -> Finding {
    match machine.files {
        usize::MAX => Finding::ok("open files", "as many as wanted"),
        files if files < FEW_FILES => Finding::note(
            "open files",
            format!(
                "{files} at most; a coordinator needs some for each worker and each client, and as many for strangers"
            ),
            "raise the limit: `ulimit -Hn`, `LimitNOFILE=` of systemd, or /etc/security/limits.conf",
        ),
        files => Finding::ok("open files", format!("{files} at most")),
    }
}

fn shared_memory(machine: &Machine) -> Finding {
    match &machine.shared_memory {
        Ok(()) => Finding::ok(
            "shared memory",
            "works: gradients need not travel within this machine",
        ),
        Err(why) => Finding::note(
            "shared memory",
            format!("does not work: {why}"),
            "workers beside a coordinator send their gradients instead, which is slower; Linux with `memfd_create` has it",
        ),
    }
}

fn gpus(gpus: &Gpus) -> Finding {
    let cards = match &gpus.cards[..] {
        [] => "no card".to_owned(),
        cards => cards.join(", "),
    };
    match (&gpus.driver, gpus.build) {
        (None, false) => Finding::ok("gpu", "none; workers compute on the processor"),
        (None, true) => Finding::note(
            "gpu",
            "this build has CUDA, but no driver of NVIDIA's is loaded",
            "install the driver, or give the container the GPU; `--device cpu` computes on the processor",
        ),
        (Some(driver), false) => Finding::note(
            "gpu",
            format!("{cards}, driver {driver}, but this build has no CUDA"),
            "build with `cargo build --release --features cuda` (docs/gpu.md)",
        ),
        (Some(driver), true) => Finding::ok("gpu", format!("{cards}, driver {driver}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::render;
    use super::*;

    fn good() -> Machine {
        Machine {
            processor: "Example 9000".into(),
            instructions: InstructionSet::Avx512,
            amx: true,
            cores: 16,
            usable: 16,
            limits: Limits::default(),
            memory: Some((64 << 30, 60 << 30)),
            files: 1 << 20,
            shared_memory: Ok(()),
            gpus: Gpus::default(),
        }
    }

    #[test]
    fn a_good_machine() {
        insta::assert_snapshot!(render(&findings(&good())), @r"
        ok       processor      Example 9000: AVX-512, AMX for bf16
        ok       cores          16, all usable
        ok       memory         64.4 GB of 68.7 GB available: room for the state of about 2.0B parameters
        ok       open files     1048576 at most
        ok       shared memory  works: gradients need not travel within this machine
        ok       gpu            none; workers compute on the processor
        this machine is fit for Cohort
        ");
    }

    #[test]
    fn a_machine_with_everything_against_it() {
        let bad = Machine {
            instructions: InstructionSet::Baseline,
            amx: false,
            usable: 3,
            limits: Limits {
                cores: Some(2.5),
                memory: Some(512 << 20),
            },
            files: 256,
            shared_memory: Err("Operation not permitted".into()),
            gpus: Gpus {
                driver: Some("550.54".into()),
                cards: vec!["NVIDIA H100".into()],
                build: false,
            },
            ..good()
        };
        insta::assert_snapshot!(render(&findings(&bad)), @r"
        note     processor      Example 9000: no AVX2 with FMA, so training is several times slower, and to other bits than with it
                                -> use machines with AVX2, or only machines without: the workers of a run must compute the same bits
        note     cores          3 usable of 16, but the control group leaves the time of 2.5
                                -> limit it to whole cores, or start workers with `--threads 2`: threads that share a core hold each other up
        note     memory         64.4 GB of 68.7 GB available, the control group leaves 536.9 MB: room for the state of about 16.8M parameters
                                -> `cohort plan` says what a run needs; end other programs, or raise the limit
        note     open files     256 at most; a coordinator needs some for each worker and each client, and as many for strangers
                                -> raise the limit: `ulimit -Hn`, `LimitNOFILE=` of systemd, or /etc/security/limits.conf
        note     shared memory  does not work: Operation not permitted
                                -> workers beside a coordinator send their gradients instead, which is slower; Linux with `memfd_create` has it
        note     gpu            NVIDIA H100, driver 550.54, but this build has no CUDA
                                -> build with `cargo build --release --features cuda` (docs/gpu.md)
        this machine is fit for Cohort; 6 notes
        ");
    }

    #[test]
    fn what_is_not_known_is_said() {
        let other = Machine {
            instructions: InstructionSet::Avx2,
            amx: false,
            limits: Limits {
                cores: Some(16.0),
                memory: Some(128 << 30),
            },
            memory: None,
            files: usize::MAX,
            gpus: Gpus {
                build: true,
                ..Gpus::default()
            },
            ..good()
        };
        insta::assert_snapshot!(render(&findings(&other)), @r"
        ok       processor      Example 9000: AVX2, no AMX, so bf16 (`train.precision`) saves no time here
        ok       cores          16, all usable
        ok       memory         not known on this platform
        ok       open files     as many as wanted
        ok       shared memory  works: gradients need not travel within this machine
        note     gpu            this build has CUDA, but no driver of NVIDIA's is loaded
                                -> install the driver, or give the container the GPU; `--device cpu` computes on the processor
        this machine is fit for Cohort; 1 note
        ");
    }
}
