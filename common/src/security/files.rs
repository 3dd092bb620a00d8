//! Files that only their owner may read, written whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use super::SecurityError;

/// Names the file in an error.
pub fn at(path: &Path) -> impl Fn(io::Error) -> SecurityError + '_ {
    move |source| SecurityError::File {
        path: path.to_owned(),
        source,
    }
}

/// Makes a directory that only its owner may enter.
pub fn make_private(directory: &Path) -> Result<(), SecurityError> {
    fs::create_dir_all(directory).map_err(at(directory))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let only_owner = fs::Permissions::from_mode(0o700);
        fs::set_permissions(directory, only_owner).map_err(at(directory))?;
    }
    Ok(())
}

/// Writes a file that only its owner may read, in the place of what was there.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), SecurityError> {
    write(path, bytes).map_err(at(path))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Two processes may write the same file; each has its own on the way.
    let unfinished = path.with_extension(format!("unfinished-{}", std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&unfinished)?;
    #[cfg(unix)]
    keep_owner(&file, path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)
}

/// Gives a file to whom its directory belongs: a token that root makes is for the service whose home this is.
#[cfg(unix)]
fn keep_owner(file: &fs::File, path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};
    // That of a bare name is the working directory.
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    let directory = fs::metadata(directory.unwrap_or(Path::new(".")))?;
    let own = file.metadata()?;
    match (own.uid(), own.gid()) == (directory.uid(), directory.gid()) {
        true => Ok(()),
        // Only root can, and only root has to.
        false if own.uid() == 0 => fchown(file, Some(directory.uid()), Some(directory.gid())),
        false => Ok(()),
    }
}

/// Reads a small file.
pub fn read(path: &Path) -> Result<String, SecurityError> {
    fs::read_to_string(path).map_err(at(path))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn others_can_read_neither_directory_nor_file() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("security");
        make_private(&directory).unwrap();
        let file = directory.join("key");
        write_private(&file, b"one").unwrap();
        write_private(&file, b"two").unwrap();
        assert_eq!(read(&file).unwrap(), "two");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&file)), (0o700, 0o600));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }
}
