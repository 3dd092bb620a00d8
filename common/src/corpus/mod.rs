//! The corpus: from files of text to immutable shards of tokens, and from those to samples.
//!
//! In reading order: `source` (which files), `text` (their documents, checked; with `field`, `formats`, tables and other
//! files of rows, `packing` and `limits`), `split` (who trains, who validates), `tokenizer`, `train`, `pieces` and
//! `stretches` (text to tokens), `batches` (who does that), `kept` (so that it need not be done again), `encode` and `shard`
//! (tokens to files), `prepare` and `scan` (all of it in turn), `select` (which documents stay), for supervised samples
//! `objective`, `supervise` and `rows`, `index` and `store` (what a prepared corpus is, and where), `names` (what it is
//! called), `reader` (samples and validation windows), `baseline` (losses to compare with), `tally`, `head` and `stats` (what
//! people look at).
//!
//! Everything here is synchronous and may take long: async callers run it where blocking is allowed. Parallel parts use
//! rayon's current pool, and no result depends on its size.

mod baseline;
mod batches;
mod encode;
mod error;
mod field;
mod formats;
mod head;
mod index;
mod kept;
mod limits;
mod names;
mod objective;
mod packing;
mod pieces;
mod prepare;
mod reader;
mod rows;
mod scan;
mod select;
mod shard;
mod source;
mod split;
mod stats;
mod store;
mod stretches;
mod supervise;
mod tally;
mod text;
mod tokenizer;
mod train;

pub use baseline::{
    BASELINE_FILE, Baselines, NgramScore, baselines, compute_baselines, keep_baselines,
};
pub use batches::{BatchEncoder, Here, PendingBatch, Tokens, encode_batch};
pub use error::{BadInput, CorpusError, Place, Problem};
pub use head::{HeadDocument, HeadLimits, head};
pub use index::{
    CorpusIndex, FORMAT_VERSION, OptionsSummary, SampleCounts, SkippedSummary, SourceSummary,
    SplitIndex, Supervised, TokenizerSummary,
};
pub use names::{NAMES_FILE, name_of};
pub use objective::{Objective, SupervisedConfig, TooLong};
pub use pieces::Cut;
pub use prepare::{
    DEFAULT_SAMPLE_BYTES, PrepareRequest, Prepared, Progress, Stage, prepare, prepare_with,
    prepared,
};
pub use reader::{
    LocalShards, SampleReader, ShardSource, Window, order_of, samples, share_of, windows,
};
pub use rows::{Packer, Row, Sample};
pub use select::{
    BadSelection, DEFAULT_CONFIDENCE, DEFAULT_THRESHOLD, Dedup, Dropped, LOOKED_AT_BYTES, Reason,
    Selection, SelectionSummary,
};
pub use shard::{DEFAULT_SHARD_TOKENS, MappedShard, ShardEntry, verify_file};
pub use source::{
    Compression, MANIFEST, SourceFile, SourceKind, Sources, TEXT_EXTENSIONS, expand, is_text_name,
    manifest_lines,
};
pub use split::{MANY_DOCUMENTS, Split, SplitConfig, SplitError, SplitMethod, SplitPlan};
pub use stats::{
    CorpusStats, FrequentToken, LengthRange, Lengths, Share, Shares, SideStats, stats,
};
pub use store::{
    Corpus, INDEX_FILE, Listing, TOKENIZER_FILE, find, list, remove, remove_unfinished,
};
pub use supervise::{Encoded, MAX_LABELS, Sampler};
pub use tally::{SOURCES_FILE, SourceCounts, SourceTable, TextCounts};
pub use text::{Event, ReadOptions, read_content, read_documents};
pub use tokenizer::{END_OF_TEXT, StreamDecoder, Tokenizer, TokenizerConfig, TokenizerError};
pub use train::{BpeTraining, MIN_BPE_VOCAB, char_tokenizer};

#[cfg(test)]
mod tests;
