//! How a checkpoint wants to be talked to: its chat template, and the texts of its special tokens.

use super::reader::{Checkpoint, read_text};
use super::{CHAT_TEMPLATE, CheckpointError, TOKENIZER_CONFIG};
use crate::supervised::{SpecialTexts, TokenizerConfigError, chat_template_of, special_texts};

impl Checkpoint {
    /// The text of the chat template: `chat_template.jinja` where that is there, else what `tokenizer_config.json` has.
    ///
    /// # Errors
    /// A file that cannot be read or is not what it should be. That the text is a template is not checked.
    pub fn chat_template(&self) -> Result<Option<String>, CheckpointError> {
        let (dir, manifest) = self.texts();
        if dir.join(CHAT_TEMPLATE).exists() {
            return read_text(dir, CHAT_TEMPLATE, manifest).map(Some);
        }
        Ok(self.of_tokenizer_config(chat_template_of)?.flatten())
    }

    /// The special tokens that `tokenizer_config.json` names; none where there is no such file.
    ///
    /// # Errors
    /// A file that cannot be read or is not what it should be.
    pub fn special_texts(&self) -> Result<SpecialTexts, CheckpointError> {
        Ok(self.of_tokenizer_config(special_texts)?.unwrap_or_default())
    }

    fn of_tokenizer_config<T>(
        &self,
        read: impl Fn(&str) -> Result<T, TokenizerConfigError>,
    ) -> Result<Option<T>, CheckpointError> {
        let (dir, manifest) = self.texts();
        let path = dir.join(TOKENIZER_CONFIG);
        if !path.exists() {
            return Ok(None);
        }
        let text = read_text(dir, TOKENIZER_CONFIG, manifest)?;
        let found = read(&text);
        found
            .map(Some)
            .map_err(|source| CheckpointError::TokenizerConfig { path, source })
    }
}
