//! Finds what a mistyped key was meant to be: the keys that a table takes, asked of its serde implementation so that no
//! second list can go stale, the edit distance between words, and the names that other trainers use.

use serde::de::{self, Deserialize, Visitor};

/// What other trainers call our keys.
const ELSEWHERE: &[(&str, &str)] = &[
    ("layers", "model.num_hidden_layers"),
    ("n_layer", "model.num_hidden_layers"),
    ("n_layers", "model.num_hidden_layers"),
    ("num_layers", "model.num_hidden_layers"),
    ("heads", "model.num_attention_heads"),
    ("n_head", "model.num_attention_heads"),
    ("n_heads", "model.num_attention_heads"),
    ("num_heads", "model.num_attention_heads"),
    ("kv_heads", "model.num_key_value_heads"),
    ("n_kv_heads", "model.num_key_value_heads"),
    ("head_size", "model.head_dim"),
    ("qkv_bias", "model.attention_bias"),
    ("use_qk_norm", "model.qk_norm"),
    ("hidden", "model.hidden_size"),
    ("dim", "model.hidden_size"),
    ("width", "model.hidden_size"),
    ("n_embd", "model.hidden_size"),
    ("d_model", "model.hidden_size"),
    ("intermediate", "model.intermediate_size"),
    ("block_size", "model.context"),
    ("seq_len", "model.context"),
    ("max_seq_len", "model.context"),
    ("max_position_embeddings", "model.context"),
    ("arch", "model.architecture"),
    ("model_type", "model.architecture"),
    ("lr", "train.learning_rate"),
    ("min_lr", "train.min_learning_rate"),
    ("warmup", "train.warmup_steps"),
    ("warmup_iters", "train.warmup_steps"),
    ("max_iters", "train.steps"),
    ("max_steps", "train.steps"),
    ("iters", "train.steps"),
    ("batch_size", "train.micro_batch"),
    ("micro_batch_size", "train.micro_batch"),
    ("gradient_accumulation_steps", "train.accumulate"),
    ("grad_accum", "train.accumulate"),
    ("lr_scheduler_type", "train.schedule"),
    ("wd", "train.weight_decay"),
    ("clip", "train.grad_clip"),
    ("max_grad_norm", "train.grad_clip"),
    ("eval_interval", "train.eval_every"),
    ("eval_steps", "train.eval_every"),
    ("save_steps", "checkpoint.every"),
    ("save_total_limit", "checkpoint.keep"),
    ("path", "corpus.paths"),
    ("files", "corpus.paths"),
    ("data", "corpus.paths"),
];

/// The names of the fields of a struct, as its `Deserialize` implementation knows them.
pub(crate) fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut fields: &'static [&'static str] = &[];
    let outcome = T::deserialize(FieldNames(&mut fields));
    debug_assert!(outcome.is_err());
    fields
}

/// A deserializer that remembers which fields were asked for, and has no value to give.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> de::Deserializer<'de> for FieldNames<'_> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(de::Error::custom("only structs have field names"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(de::Error::custom("the names are all that was wanted"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The known dotted key that `table.key` most likely means, if any is near: a name used elsewhere, the same word in
/// another table, or a word a few letters away.
pub(crate) fn nearest_key(table: &str, key: &str, known: &[String]) -> Option<String> {
    if let Some((_, ours)) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == key) {
        return Some((*ours).into());
    }
    known
        .iter()
        .filter_map(|candidate| {
            let (its_table, its_key) = candidate.split_once('.')?;
            let distance = distance(key, its_key);
            let bound = key.chars().count().max(its_key.chars().count()) / 3;
            (distance <= bound).then_some((distance, its_table != table, candidate))
        })
        .min()
        .map(|(_, _, candidate)| candidate.clone())
}

/// The nearest of some plain words, if one is near.
pub(crate) fn nearest_word<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|k| (distance(word, k), *k))
        .filter(|(d, k)| *d <= k.chars().count().max(word.chars().count()) / 2)
        .min()
        .map(|(_, k)| k)
}

/// Levenshtein's distance: letters to insert, delete or replace. Words beyond any key's length are infinitely far.
fn distance(a: &str, b: &str) -> usize {
    const LONGEST: usize = 64;
    let b: Vec<char> = b.chars().collect();
    if a.chars().count() > LONGEST || b.len() > LONGEST {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, letter) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, other) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_by_hand() {
        for (a, b, expected) in [
            ("", "", 0),
            ("steps", "steps", 0),
            ("step", "steps", 1),
            ("kitten", "sitting", 3),
            ("", "abc", 3),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
        assert_eq!(distance(&"x".repeat(1000), "x"), usize::MAX);
    }

    #[test]
    fn names_used_elsewhere_lead_to_real_keys() {
        let known = super::super::file::known_keys();
        for (theirs, ours) in ELSEWHERE {
            assert!(known.iter().any(|k| k == ours), "{theirs} leads to {ours}");
        }
    }
}
