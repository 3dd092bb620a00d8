//! Validations on the wire: what they score or write after, and what a unit gave.

use cohort_proto::v1;

use super::{WireError, bad, run_id};
use crate::cluster::messages::{Found, LaneSums, Scores};
use crate::cluster::{EvalSplit, EvalWork, FromWorker, Prompt};
use crate::ids::RunId;

pub(super) fn split_to(split: &EvalSplit) -> v1::EvalSplit {
    let mut message = v1::EvalSplit {
        label: split.label.clone(),
        units: split.units,
        ..v1::EvalSplit::default()
    };
    match &split.work {
        EvalWork::Score {
            corpus,
            split,
            windows,
        } => {
            message.corpus.clone_from(corpus);
            message.split.clone_from(split);
            message.windows = *windows;
        }
        EvalWork::Write { prompts, ends } => {
            let prompt = |prompt: &Prompt| v1::Prompt {
                tokens: prompt.tokens.clone(),
                most: prompt.most,
            };
            message.prompts = prompts.iter().map(prompt).collect();
            message.ends.clone_from(ends);
        }
    }
    message
}

pub(super) fn split_from(split: v1::EvalSplit) -> Result<EvalSplit, WireError> {
    let prompt = |prompt: v1::Prompt| Prompt {
        tokens: prompt.tokens,
        most: prompt.most,
    };
    let work = match split.prompts.len() {
        0 => EvalWork::Score {
            corpus: split.corpus,
            split: split.split,
            windows: split.windows,
        },
        prompts if prompts == split.units as usize => EvalWork::Write {
            prompts: split.prompts.into_iter().map(prompt).collect(),
            ends: split.ends,
        },
        prompts => {
            let units = split.units;
            let problem = format!("it has {units} units for {prompts} prompts");
            return Err(bad("EvalSplit", problem));
        }
    };
    Ok(EvalSplit {
        label: split.label,
        units: split.units,
        // When it is due is the coordinator's to know.
        every: 1,
        work,
    })
}

pub(super) fn unit_to(run: &RunId, step: u64, split: u32, unit: u32, found: Found) -> v1::UnitDone {
    let done = v1::UnitDone {
        run: run.as_str().into(),
        step,
        split,
        unit,
        ..v1::UnitDone::default()
    };
    match found {
        Found::Scores(scores) => v1::UnitDone {
            loss: scores.sums.loss,
            weight: scores.sums.weight,
            confusion: scores.confusion,
            ..done
        },
        Found::Written(tokens) => v1::UnitDone {
            written: Some(v1::Written { tokens }),
            ..done
        },
    }
}

pub(super) fn unit_from(done: v1::UnitDone) -> Result<FromWorker, WireError> {
    Ok(FromWorker::UnitDone {
        run: run_id(&done.run)?,
        step: done.step,
        split: done.split,
        unit: done.unit,
        found: match done.written {
            Some(written) => Found::Written(written.tokens),
            None => Found::Scores(Scores {
                sums: LaneSums {
                    loss: done.loss,
                    weight: done.weight,
                },
                confusion: done.confusion,
            }),
        },
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn there_and_back(split: &EvalSplit) -> EvalSplit {
        let bytes = split_to(split).encode_to_vec();
        let message = v1::EvalSplit::decode(bytes.as_slice()).expect("a split");
        split_from(message).expect("well-formed")
    }

    fn writes(prompts: &[&[u32]]) -> EvalSplit {
        let prompt = |tokens: &&[u32]| Prompt {
            tokens: tokens.to_vec(),
            most: 48,
        };
        EvalSplit {
            label: "samples".into(),
            units: prompts.len() as u32,
            every: 1,
            work: EvalWork::Write {
                prompts: prompts.iter().map(prompt).collect(),
                ends: vec![0, 7],
            },
        }
    }

    #[test]
    fn splits_of_text_and_of_prompts_come_back_as_they_were() {
        let scored = EvalSplit {
            label: "validation".into(),
            units: 3,
            every: 1,
            work: EvalWork::Score {
                corpus: "c".into(),
                split: "validation".into(),
                windows: 4,
            },
        };
        for split in [scored, writes(&[&[1, 2, 3], &[4]])] {
            assert_eq!(there_and_back(&split), split);
        }
        let mut missing = split_to(&writes(&[&[1], &[2]]));
        missing.prompts.pop();
        let error = split_from(missing).expect_err("a unit has no prompt");
        assert_eq!(
            error.to_string(),
            "malformed EvalSplit: it has 2 units for 1 prompts"
        );
    }

    #[test]
    fn what_a_unit_gave_comes_back_also_where_nothing_was_written() {
        let run = RunId::new("tiny-1");
        let scores = Scores {
            sums: LaneSums {
                loss: 1.5,
                weight: 2.0,
            },
            confusion: vec![1, 0, 3, 4],
        };
        for found in [
            Found::Scores(scores),
            Found::Written(vec![5, 6]),
            Found::Written(Vec::new()),
        ] {
            let bytes = unit_to(&run, 8, 1, 2, found.clone()).encode_to_vec();
            let message = v1::UnitDone::decode(bytes.as_slice()).expect("a unit");
            let expected = FromWorker::UnitDone {
                run: run.clone(),
                step: 8,
                split: 1,
                unit: 2,
                found,
            };
            assert_eq!(unit_from(message), Ok(expected));
        }
    }
}
