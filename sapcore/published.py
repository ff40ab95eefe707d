"""Numbers that the paper or its authors state in public, each with its source; none is recalled or read off a plot."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """One published accuracy or difference of accuracies, as a fraction."""

    figure: str
    series: str
    eps: float
    value: float
    source: str
    minus: str = ""
    """For a difference: the series that is subtracted."""
    decimals: int = 1
    """Of the number in per cent, as it was printed."""

    @property
    def text(self) -> str:
        """In per cent, or points with their sign, with no more decimals than it was published with."""
        return f"{100 * self.value:{'+' if self.minus else ''}.{self.decimals}f}"


PUBLISHED = (
    *(
        point
        for figure in ("fig1b", "fig3")
        for point in (
            Published(figure, "SAP-100", 0, 0.83, "the authors' entry in RobustML", decimals=0),
            Published(figure, "SAP-100", 4, 0.51, "the authors' entry in RobustML", decimals=0),
            Published(figure, "SAP-100", 1, 0.122, "the paper's text, Sec. 4.1", minus="dense"),
        )
    ),
    Published("fig3", "ADV", 0, 0.75, "Sec. 4.1 of the paper, as quoted in public"),
)

TABLE_1: dict[float, tuple[float, ...]] = {
    0: (-0.122, -0.334, -0.592, -0.658, -0.158, -0.045),
    1: (0.104, 0.133, 1.317, -0.22, 1.645, 34.259),
    2: (0.098, 0.208, 2.048, 1.101, 0.923),
    4: (0.124, 0.14, 17.6, 2.026),
    8: (0.166, 0.074, 0.609, 1.348),
}
"""Table 1: the relative change of the return by SAP-100, per eps, in the order of `environments.GAMES`.

Rows of fewer than six have blanks; which games they belong to is not to be seen in any public copy.
"""
