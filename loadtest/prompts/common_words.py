"""Common English words: one token each in nearly every large vocabulary."""

from __future__ import annotations

_TEXT = """
the be to of and a in that have it for not on with he as you do at this but his by from they we say her she or an will
my one all would there their what so up out if about who get which go me when make can like time no just him know take
people into year your good some could them see other than then now look only come its over think also back after use
two how our work first well way even new want because any these give day most us is are was were been has had did does
said made went came took got saw knew gave found told left put set kept let began seem show play run move live believe
hold bring happen write provide sit stand lose pay meet include continue learn change lead understand watch follow
stop create speak read allow add spend grow open walk win offer remember love consider appear buy wait serve die send
expect build stay fall cut reach remain suggest raise pass sell require report decide pull return explain hope develop
carry break receive agree support hit produce eat cover catch draw choose cause point listen realize place close
involve increase plan turn start might must should may each few more many much such own same both another those every
while where why before between under through during without within against around among across along toward behind
beyond above below near since until though although whether either information system computer program number problem
question answer example reason result process service state country world school family student group company
government case week month hour minute second night morning evening today yesterday tomorrow man woman child boy girl
men women children friend mother father brother sister son daughter husband wife house home room door window table
chair bed kitchen street road city town village river mountain sea ocean island tree flower grass forest animal dog
cat horse bird fish water fire earth air sun moon star sky rain snow wind weather summer winter spring autumn food
bread meat milk coffee tea sugar salt apple fruit head face eye ear nose mouth hand arm leg foot feet heart mind body
blood voice word name letter book page paper story history science art music song film movie game sport team ball
player coach race line side end part piece half quarter kind type form shape size color red blue green yellow black
white brown gray dark light bright big small large little long short high low wide narrow deep old young early late
fast slow quick easy hard simple difficult strong weak heavy hot cold warm cool dry wet clean dirty full empty rich
poor free busy ready happy sad angry afraid sure clear true false right wrong real whole certain possible important
different similar special general common public private local national international social political economic human
natural physical medical legal final main major single double recent current present past future next last best better
worse worst least less three four five six seven eight nine ten hundred thousand million percent rate price cost money
bank market trade business industry office job worker manager leader president member party law court police war peace
army power force energy action activity effect matter value idea thought fact truth theory model method test data
research study field area region land ground space center top bottom front middle corner edge level order rule list
record note sign mark map picture image photo camera phone call message mail web site link file code key machine
engine car bus train plane ship boat bridge station airport hotel shop store restaurant hospital church college
university class course lesson teacher doctor nurse lawyer writer artist actor king queen prince captain soldier
officer judge driver farmer cook guard guest neighbor stranger enemy partner customer client patient able accept
account achieve act actually address admit adult affect age agency agent ago ahead almost alone already always amount
analysis ancient announce annual apart apparent apply approach argue arrive article ask assume attempt attend
attention attitude audience author authority available average avoid award aware away baby bad bag bar base basic
basis basket battle bear beat beautiful become benefit beside bill bit board born bottle box brain branch brief budget
burn button cake campaign candidate capital card care career cell central century challenge chance character charge
check chief choice circle citizen civil claim collection commercial community compare concern condition conference
congress contain control conversation couple crime culture cup dance danger date deal death debate decade decision
defense degree democratic describe design despite detail determine device dinner direction director discover discuss
disease dozen dream dress drink drive drop duty east economy edition education effort election element else employee
encourage enjoy enough enter entire environment equal especially establish event ever evidence exactly exist
experience expert express extra factor fail fair famous farm fashion fear feel feeling fight figure fill financial
find fine finger finish firm fit floor focus foreign forget former forward frame freedom fuel function fund garden gas
glass goal gold growth guess hair hall hang hat hate health hear heat help here herself hide hill himself however huge
identify imagine impact improve income indeed independent indicate individual inside instead institution insurance
interest interview invest iron issue item itself join journey jump justice keep kid knee knife knowledge labor lack
lady lake language later laugh lay leave library lie life likely limit lip logic loss lot lower luck lunch magazine
maintain majority manage manner material maybe meal mean measure media memory mention metal mile military miss mission
mistake mix modern moment museum myself nation nature necessary neck need network never news newspaper none nor north
notice nothing object occur off often oil once operation opportunity option original others outside owner pain pair
parent park particular path pattern per perform perhaps period person phrase pick pilot pink plant plate please pocket
poem poet policy pool population position positive potential practice prepare pressure prevent print prison probably
professional professor profit project promise proper property protect prove purpose push quality quiet quite radio
range rather reader reality really reduce refer reflect relate relationship religious remove repeat replace represent
resource respond response rest reveal ride ring rise risk rock role roof root rope rose round row safe save scale
scene score screen search season seat section security seek senior sense series serious session several shake share
sharp shirt shoe shoulder shout shown silver sing skill skin sleep smell smile smoke smooth soft soil solution solve
somebody someone something sometimes soon sort soul sound source south speech speed spirit split spot spread square
stage standard statement status steel step stick still stock stone straight strategy stream strength stress strike
structure stuff style subject success suddenly suffer suit supply surface surprise swim switch symbol task taste tax
teach technology television tend term themselves thick thin thing third threat throw thus tie tiny tired title
together tone tonight tool total touch tough tour tower track tradition travel treat treatment trial trip trouble
truck trust try unit upon usually various vast version very victim view visit volume vote wall wash waste wave wear
weight welcome west wheel whom whose wild wine wing wise wish wonder wood worry worth yard yeah yes yet yourself zero
zone
"""

#: Lower case, ASCII, each once.
COMMON_WORDS: tuple[str, ...] = tuple(_TEXT.split())
