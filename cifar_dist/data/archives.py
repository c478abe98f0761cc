"""What is known of the official CIFAR archives before any of their files is read."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """One file of an archive; one without images is unpacked for other programs and not read here."""

    name: str
    md5: str
    images: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """One archive: its files, and where to have them from."""

    name: str
    class_names: tuple[str, ...]
    folder: str  # in the tarball, and below the data folder
    train: tuple[ArchiveFile, ...]  # in the official order
    test: tuple[ArchiveFile, ...]
    others: tuple[ArchiveFile, ...]
    label_key: bytes
    tarball: str
    tarball_md5: str
    urls: tuple[str, ...]
    urls_variable: str  # the environment variable that replaces `urls`

    @property
    def files(self) -> tuple[ArchiveFile, ...]:
        """All files, those without images last."""
        return self.train + self.test + self.others


# The md5 of the tarball is that on https://www.cs.toronto.edu/~kriz/cifar.html; torchvision has those of its files.
CIFAR10 = Archive(
    name="cifar10",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    folder="cifar-10-batches-py",
    train=(
        ArchiveFile("data_batch_1", "c99cafc152244af753f735de768cd75f", 10_000),
        ArchiveFile("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", 10_000),
        ArchiveFile("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", 10_000),
        ArchiveFile("data_batch_4", "634d18415352ddfa80567beed471001a", 10_000),
        ArchiveFile("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", 10_000),
    ),
    test=(ArchiveFile("test_batch", "40351d587109b95175f43aff81a1287e", 10_000),),
    others=(ArchiveFile("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),),
    label_key=b"labels",
    tarball="cifar-10-python.tar.gz",
    tarball_md5="c58f30108f718f92721af3b95e74349a",
    # PaddlePaddle's mirror of the same bytes comes first: the official server gives 66 to 85 kB/s
    # (https://github.com/pytorch/vision/issues/9536).
    urls=(
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    urls_variable="CIFAR_DIST_CIFAR10_URLS",
)

# The md5 of the tarball is that on the same page, and torchvision has those of these files, too. The fine labels are
# used, whose names are in the order of `fine_label_names` in the file `meta`.
CIFAR100 = Archive(
    name="cifar100",
    class_names=tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
        can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
        lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
        seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
        tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
        worm
        """.split()
    ),
    folder="cifar-100-python",
    train=(ArchiveFile("train", "16019d7e3df5f24257cddd939b257f8d", 50_000),),
    test=(ArchiveFile("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", 10_000),),
    others=(ArchiveFile("meta", "7973b15100ade9c7d40fb424638fde48"),),
    label_key=b"fine_labels",
    tarball="cifar-100-python.tar.gz",
    tarball_md5="eb9058c3a382ffc7106e4002c42a8d85",
    urls=(
        "https://dataset.bj.bcebos.com/cifar/cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    urls_variable="CIFAR_DIST_CIFAR100_URLS",
)

ARCHIVES = {archive.name: archive for archive in (CIFAR10, CIFAR100)}
