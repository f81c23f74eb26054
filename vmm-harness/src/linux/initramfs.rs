//! The guest's first and only file system: a shell, the driver's modules, and an `/init` that answers the host.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::LinuxError;

/// Process 1.
///
/// Facts from before the driver are kept in files. Then each line is a token and a command; the answer to it is what
/// the command prints, and the token with the exit status on a line of their own.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
sed -n 's/.*vmem\\.online=\\([a-z_]*\\).*/\\1/p' /proc/cmdline > /sys/devices/system/memory/auto_online_blocks
cat /proc/meminfo > /boot-meminfo
ls /sys/devices/system/memory > /boot-memory
for module in /modules/*.ko; do insmod $module; done
dmesg -n 3
stty -echo -onlcr
echo 'vmem: ready'
while read -r token command; do
    eval \"$command\" </dev/null 2>&1
    printf '\\n%s %s\\n' $token $?
done
poweroff -f
";

/// What [`INIT`] says when it listens.
pub(super) const READY: &str = "vmem: ready";

/// Writes the archive to `path`: newc, gzip. Modules are inserted in the order given.
pub(super) fn write(
    path: &Path,
    busybox: &Path,
    modules: &[(&'static str, PathBuf)],
) -> Result<(), LinuxError> {
    let read = |path: &Path| fs::read(path).map_err(LinuxError::file(path));
    let mut files = vec![
        ("bin/busybox".to_owned(), read(busybox)?),
        ("init".to_owned(), INIT.into()),
    ];
    for (index, (name, file)) in modules.iter().enumerate() {
        files.push((format!("modules/{index}-{name}.ko"), read(file)?));
    }
    let mut out = Vec::new();
    archive(&mut out, &files).map_err(LinuxError::file(path))?;
    fs::write(path, out).map_err(LinuxError::file(path))
}

fn archive(out: &mut Vec<u8>, files: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut gzip = GzEncoder::new(out, Compression::fast());
    let mut inode = 0;
    let mut entry = |gzip: &mut GzEncoder<_>, name: &str, kind, content: &[u8]| {
        inode += 1;
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let builder = Builder::new(name)
            .ino(inode)
            .nlink(1)
            .mode(0o755)
            .set_mode_file_type(kind);
        let mut writer = builder.write(gzip, size);
        writer.write_all(content)?;
        writer.finish().map(|_| ())
    };
    for folder in ["bin", "dev", "modules", "proc", "sys"] {
        entry(&mut gzip, folder, ModeFileType::Directory, &[])?;
    }
    for (name, content) in files {
        entry(&mut gzip, name, ModeFileType::Regular, content)?;
    }
    trailer(&mut gzip)?;
    gzip.finish().map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use cpio::newc::Reader;
    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn the_archive_holds_what_was_put_in_and_the_kernel_may_run_it() {
        let files = [
            ("init".to_owned(), b"#!".to_vec()),
            ("modules/0-a.ko".to_owned(), vec![7; 4097]),
        ];
        let mut out = Vec::new();
        archive(&mut out, &files).unwrap();
        let mut bytes = Vec::new();
        GzDecoder::new(out.as_slice())
            .read_to_end(&mut bytes)
            .unwrap();

        let (mut rest, mut found) = (bytes.as_slice(), Vec::new());
        loop {
            let mut reader = Reader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            found.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish().unwrap();
        }
        // Regular files, executable; folders come before what is in them.
        assert_eq!(found[5], ("init".to_owned(), 0o100_755, b"#!".to_vec()));
        assert_eq!(
            found[6],
            ("modules/0-a.ko".to_owned(), 0o100_755, vec![7; 4097])
        );
        assert!(
            found[..5]
                .iter()
                .all(|(_, mode, content)| *mode == 0o040_755 && content.is_empty())
        );
        assert_eq!(found.len(), 7);
    }
}
