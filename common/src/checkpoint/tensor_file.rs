//! One safetensors file, read tensor by tensor in the order of its bytes, in bounded memory.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::CheckpointError;
use super::tensors::{self, TensorInfo};

/// Elements that are converted at a time.
const BLOCK: usize = 64 << 10;

/// An open safetensors file whose header is valid and tiles its data.
pub(super) struct TensorFile {
    path: PathBuf,
    file: BufReader<File>,
    data_begin: u64,
    tensors: Vec<TensorInfo>,
}

impl TensorFile {
    pub fn open(path: PathBuf) -> Result<Self, CheckpointError> {
        let read = |file: &mut BufReader<File>, buffer: &mut [u8]| {
            file.read_exact(buffer)
                .map_err(CheckpointError::io("read", &path))
        };
        let file = File::open(&path).map_err(CheckpointError::io("read", &path))?;
        let bytes = file
            .metadata()
            .map_err(CheckpointError::io("read", &path))?
            .len();
        if bytes < 8 {
            let reason = format!("it has {bytes} bytes, too few for a safetensors file");
            return Err(CheckpointError::malformed(&path, reason));
        }
        let mut file = BufReader::new(file);
        let mut prefix = [0; 8];
        read(&mut file, &mut prefix)?;
        let malformed = |reason| CheckpointError::malformed(&path, reason);
        let len = tensors::header_len(prefix, bytes).map_err(malformed)?;
        let mut header = vec![0; len];
        read(&mut file, &mut header)?;
        let data_begin = 8 + len as u64;
        let tensors = tensors::parse_header(&header, bytes - data_begin).map_err(malformed)?;
        Ok(Self {
            path,
            file,
            data_begin,
            tensors,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor is there, in this shape and in a type that can be read.
    pub fn check_present(&self, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
        let path = self.path.clone();
        let name = name.to_owned();
        let Some(found) = self.tensors.iter().find(|t| t.name == name) else {
            return Err(CheckpointError::MissingTensor { path, name });
        };
        if found.shape != shape {
            return Err(CheckpointError::WrongShape {
                path,
                name,
                expected: shape.to_vec(),
                found: found.shape.clone(),
            });
        }
        match tensors::convertible_bytes(&found.dtype) {
            Some(_) => Ok(()),
            None => Err(CheckpointError::WrongType {
                path,
                name,
                dtype: found.dtype.clone(),
            }),
        }
    }

    pub fn unexpected(&self, name: &str) -> CheckpointError {
        CheckpointError::UnexpectedTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        }
    }

    /// Offers every tensor in the order of the file; a tensor that `visit` does not read is skipped.
    pub fn read_each(
        &mut self,
        mut visit: impl FnMut(&TensorInfo, TensorReader<'_>) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        for tensor in &self.tensors {
            let position = SeekFrom::Start(self.data_begin + tensor.begin);
            self.file
                .seek(position)
                .map_err(CheckpointError::io("read", &self.path))?;
            let reader = TensorReader {
                path: &self.path,
                file: &mut self.file,
                tensor,
            };
            visit(tensor, reader)?;
        }
        Ok(())
    }
}

/// Reads one tensor.
pub(super) struct TensorReader<'a> {
    path: &'a Path,
    file: &'a mut BufReader<File>,
    tensor: &'a TensorInfo,
}

impl TensorReader<'_> {
    /// Reads all elements as f32.
    ///
    /// # Panics
    /// If `out` has another number of elements: shapes are checked before.
    pub fn into_slice(self, out: &mut [f32]) -> Result<(), CheckpointError> {
        assert_eq!(out.len(), self.tensor.elements());
        self.into_part(0, out)
    }

    /// Reads the elements from `first` on as f32, as many as `out` has.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn into_part(self, first: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        assert!(first + out.len() <= self.tensor.elements());
        let size =
            tensors::convertible_bytes(&self.tensor.dtype).ok_or_else(|| self.wrong_type())?;
        self.file
            .seek_relative((size * first) as i64)
            .map_err(CheckpointError::io("read", self.path))?;
        let mut bytes = vec![0; size * BLOCK.min(out.len())];
        for block in out.chunks_mut(BLOCK) {
            let bytes = &mut bytes[..size * block.len()];
            self.file
                .read_exact(bytes)
                .map_err(CheckpointError::io("read", self.path))?;
            tensors::convert(&self.tensor.dtype, bytes, block).ok_or_else(|| self.wrong_type())?;
        }
        Ok(())
    }

    /// Checks that all elements are zero. The tensor is a bias, so it is small.
    pub fn must_be_zero(self) -> Result<(), CheckpointError> {
        let (path, name) = (self.path.to_owned(), self.tensor.name.clone());
        let mut values = vec![0.0; self.tensor.elements()];
        self.into_slice(&mut values)?;
        match values.iter().all(|v| *v == 0.0) {
            true => Ok(()),
            false => Err(CheckpointError::BiasNotZero { path, name }),
        }
    }

    /// The error of a tensor that does not belong here.
    pub fn unexpected(&self) -> CheckpointError {
        CheckpointError::UnexpectedTensor {
            path: self.path.to_owned(),
            name: self.tensor.name.clone(),
        }
    }

    fn wrong_type(&self) -> CheckpointError {
        CheckpointError::WrongType {
            path: self.path.to_owned(),
            name: self.tensor.name.clone(),
            dtype: self.tensor.dtype.clone(),
        }
    }
}
